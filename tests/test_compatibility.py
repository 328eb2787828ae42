"""The releases that the project is tested with are those that it declares."""

from __future__ import annotations

import re

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.helpers.processes import ROOT

BUILDERS = {"setuptools", "sphinx", "furo", "myst-parser"}
UNTESTED_FLOORS = BUILDERS | {"torch", "pytest-xdist", "ruff", "mypy", "vllm", "trl", "gguf"}
"""torch is pinned in ci.txt, tools build or check the code and are not called by it, and the others have separate
environments."""


def lowest_allowed() -> dict[str, str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # Python 3.10 has no tomllib
    return dict(re.findall(r'"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)[",]', text))


def test_the_lowest_tested_releases_are_the_lowest_allowed() -> None:
    lines = (ROOT / "tests" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    allowed = {name: floor for name, floor in lowest_allowed().items() if name not in UNTESTED_FLOORS}
    assert pinned.keys() == allowed.keys()
    for name, floor in allowed.items():
        assert re.fullmatch(rf"{re.escape(floor)}(\.0)*", pinned[name]), name


def test_ci_tests_an_allowed_torch() -> None:
    (constraint,) = re.findall(r"^torch==(\S+)$", (ROOT / "tests" / "ci.txt").read_text(encoding="utf-8"), re.MULTILINE)
    (allowed,) = re.findall(r'"torch(>=.+?)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert Version(constraint) in SpecifierSet(allowed)
