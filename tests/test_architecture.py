"""What docs/architecture.md promises: imports run one way, and every file and function can be read in a sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

FILES = sorted([*(ROOT / "rlrt_lightning").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")])

FLOORS: list[set[str]] = [
    {"runtime", "objective"},
    {"tasks"},
    {"policy"},
    {"rollouts"},
    {"teacher"},
    {"epoch"},
    {"evaluation"},
    {"resume"},
    {"module"},
    {"datamodule"},
    {"callbacks", "analysis"},
    {"cli"},
    {"__main__"},
]
"""From the ground up; a part imports from its own floor and those below it."""

ALLOWED = {
    # Objects of Lightning's that a run is compared by, whose settings only the callback itself knows.
    ("resume", "callbacks"),
    # The module brings its callbacks itself (Lightning's `configure_callbacks`).
    ("module", "callbacks"),
}


def part(path: Path) -> str:
    inside = path.relative_to(ROOT / "rlrt_lightning") if "rlrt_lightning" in path.parts else Path("callbacks")
    return inside.parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """The parts that a file imports, wherever it does so."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            own = node.module == "rlrt_lightning"
            modules = [f"rlrt_lightning.{a.name}" for a in node.names] if own else [node.module or ""]
        for module in modules:
            words = module.split(".")
            if words[0] == "rlrt_lightning" and len(words) > 1 and words[1][0].islower():
                yield words[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    if path.name == "__init__.py" and path.parent.name == "rlrt_lightning":
        return  # lists what is public
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    for other in set(imported(path)) & floor.keys():
        own = part(path)
        assert floor[other] <= floor[own] or (own, other) in ALLOWED, f"{own} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_can_be_read_in_a_sitting(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.body[0].lineno < 60, f"{node.name} is long"


def test_the_top_of_the_package_can_be_seen_at_a_glance() -> None:
    names = {path.name for path in (ROOT / "rlrt_lightning").iterdir()} - {"__init__.py", "py.typed", "__pycache__"}
    assert len(names) <= 20
