"""Files and folders that are never half there: written under another name, and renamed when they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART, BEFORE = ".part", ".before"
"""Suffixes of what is being written, and of the folder that it replaces while the two change places."""


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Where to write a file or folder that is to appear at a path when it is complete. Where it fails nothing of it is
    left, and what was at the path is still there."""
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
    """Writes a text file in UTF-8 (`written_aside`)."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _rename(aside: Path, path: Path) -> None:
    """Moves what is complete to its path; a folder cannot replace another one in one go."""
    before = path.with_name(path.name + BEFORE)
    if (path.is_dir() and not path.is_symlink()) or (aside.is_dir() and path.exists()):
        remove(before)
        path.rename(before)
    os.replace(aside, path)
    remove(before)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Has the names in a folder reach the disk, where that can be asked for: Windows opens no folders."""
    try:
        folder = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
