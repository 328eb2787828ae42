"""New folders, and atomic writes of files and folders: to a temporary path beside the target, renamed when complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path

RUNS = Path("runs")
"""Holds the folders of all runs, unless the logger has another one."""

EVALUATION, PLOTS = "evaluation", "plots"
"""Folders of a run for its evaluations and analyses."""

PART, BEFORE = ".part", ".before"
"""Suffix of an incomplete file or folder, and of the previous folder while it is being replaced."""


def new_folder(parent: Path, name: str) -> Path:
    """Creates a folder `<name>`, or `<name>-2`, `<name>-3`, ... if it exists."""
    parent.mkdir(parents=True, exist_ok=True)
    for path in chain([parent / name], (parent / f"{name}-{n}" for n in count(2))):
        with suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError("unreachable")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write a file or folder to, and renames it to `path` on success. On an error the
    temporary path is removed and whatever was at `path` is kept."""
    aside = path.with_name(path.name + PART)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(aside)
        yield aside
        _rename(aside, path)
    except BaseException:
        with suppress(OSError):
            remove(aside)
        raise


def write_whole(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) atomically."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _rename(aside: Path, path: Path) -> None:
    """Moves a complete file or folder to its path. A folder cannot replace another, so that is moved away first."""
    before = path.with_name(path.name + BEFORE)
    if (path.is_dir() and not path.is_symlink()) or (aside.is_dir() and path.exists()):
        remove(before)
        path.rename(before)
    os.replace(aside, path)
    remove(before)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Syncs a folder's entries to disk. Windows cannot open folders, so it does nothing there."""
    try:
        folder = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove(path: Path) -> None:
    """Removes a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
