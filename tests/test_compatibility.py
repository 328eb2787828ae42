"""What the project says it works with is what it is tested with."""

from __future__ import annotations

import re

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.helpers.processes import ROOT

UNTESTED_FLOORS = {"setuptools", "torch", "pytest-xdist", "ruff", "mypy", "vllm", "trl", "gguf"}
"""torch is that of ci.txt, tools check the code and are not called by it, and the rest has environments of its
own."""


def floors() -> dict[str, str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # Python 3.10 has no tomllib
    return dict(re.findall(r'"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)[",]', text))


def test_the_lowest_releases_that_are_tested_are_those_that_are_allowed() -> None:
    lines = (ROOT / "tests" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    allowed = {name: floor for name, floor in floors().items() if name not in UNTESTED_FLOORS}
    assert pinned.keys() == allowed.keys()
    for name, floor in allowed.items():
        assert re.fullmatch(rf"{re.escape(floor)}(\.0)*", pinned[name]), name


def test_ci_tests_a_torch_that_is_allowed() -> None:
    (constraint,) = re.findall(r"^torch==(\S+)$", (ROOT / "tests" / "ci.txt").read_text(encoding="utf-8"), re.MULTILINE)
    (allowed,) = re.findall(r'"torch(>=.+?)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert Version(constraint) in SpecifierSet(allowed)
