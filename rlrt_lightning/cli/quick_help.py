"""`--help` without waiting: its text is kept in the user's cache, for as long as nothing that makes it changes.

Making it takes five seconds, four of which are the imports of torch, transformers and Lightning, which no lazy import
of ours avoids: the flags of Lightning's classes are part of the text.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rlrt_lightning.runtime.files import write_whole

MAKERS = ("lightning", "jsonargparse", "torch", "docstring-parser", "typeshed-client", "rich-argparse")
"""Whose releases change the text, beside our own files."""


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether the command line is `--help`, or a command and `--help`; anything else may depend on the user's code."""
    return 1 <= len(words) <= 2 and words[-1] in ("-h", "--help") and not words[0].startswith("--config")


def show(words: Sequence[str], make: Callable[[], object]) -> None:
    """Prints the help.

    Args:
        words: Of the command line.
        make: Prints it in the long way, which takes the import of torch and Lightning; may raise SystemExit.
    """
    kept = folder() / f"help-{_key(words)}.txt"
    with suppress(OSError, UnicodeError):
        print(kept.read_text(encoding="utf-8"), end="")
        return
    made = io.StringIO()
    with redirect_stdout(made), suppress(SystemExit):
        make()
    print(made.getvalue(), end="")
    with suppress(OSError):  # a home that cannot be written to: it takes the long way again
        write_whole(kept, made.getvalue())


def folder() -> Path:
    """Where the texts are kept: `rlrt_lightning` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlrt_lightning"


def _key(words: Sequence[str]) -> str:
    here = Path(__file__).resolve().parents[1]  # of the package
    files = sorted({*here.rglob("*.py"), *(here.parent / "callbacks").glob("*.py")})
    parts = [*words, sys.version, str(shutil.get_terminal_size().columns), str(sys.stdout.isatty())]
    parts += [f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}" for path in files]
    for name in MAKERS:
        with suppress(PackageNotFoundError):
            parts.append(f"{name} {version(name)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
