"""Rules of docs/architecture.md: imports run one way, and every file and function is short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

FILES = sorted([*(ROOT / "rlrt_lightning").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")])

LAYERS: list[set[str]] = [
    {"runtime", "objective"},
    {"tasks"},
    {"policy"},
    {"rollouts"},
    {"teacher", "contexts"},
    {"epoch"},
    {"evaluation"},
    {"resume"},
    {"module"},
    {"datamodule"},
    {"callbacks", "analysis"},
    {"cli"},
    {"__main__"},
]
"""From bottom to top; a part imports only from its own layer and the layers below it."""

ALLOWED = {
    # A resumed run compares the teacher's refresh, whose settings only the callback knows.
    ("resume", "callbacks"),
    # The module returns the default callbacks in Lightning's `configure_callbacks`.
    ("module", "callbacks"),
}


def part(path: Path) -> str:
    inside = path.relative_to(ROOT / "rlrt_lightning") if "rlrt_lightning" in path.parts else Path("callbacks")
    return inside.parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """The parts of the package that a file imports, at module level or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            own = node.module == "rlrt_lightning"
            modules = [f"rlrt_lightning.{a.name}" for a in node.names] if own else [node.module or ""]
        for module in modules:
            names = module.split(".")
            if names[0] == "rlrt_lightning" and len(names) > 1 and names[1][0].islower():
                yield names[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    if path.name == "__init__.py" and path.parent.name == "rlrt_lightning":
        return  # it lists the public names
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    for other in set(imported(path)) & layer.keys():
        own = part(path)
        assert layer[other] <= layer[own] or (own, other) in ALLOWED, f"{own} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.body[0].lineno < 60, f"{node.name} is long"


def test_the_package_has_at_most_20_top_level_entries() -> None:
    names = {path.name for path in (ROOT / "rlrt_lightning").iterdir()} - {"__init__.py", "py.typed", "__pycache__"}
    assert len(names) <= 20
