"""Caches the text of `--help` in the user's cache folder until one of its sources changes.

Generating it takes five seconds, four of them for importing torch, transformers and Lightning. Lazy imports cannot
avoid this, because the text includes the flags of Lightning's classes.
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

TEXT_PACKAGES = ("lightning", "jsonargparse", "torch", "docstring-parser", "typeshed-client", "rich-argparse")
"""Packages whose releases change the text, besides our own files."""


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether the command line is `--help` or `COMMAND --help`. The help of anything else may depend on user code."""
    return 1 <= len(words) <= 2 and words[-1] in ("-h", "--help") and not words[0].startswith("--config")


def show(words: Sequence[str], make: Callable[[], object]) -> None:
    """Prints the help.

    Args:
        words: The arguments of the command line.
        make: Generates and prints the help, which imports torch and Lightning; may raise SystemExit.
    """
    cached = cache_folder() / f"help-{_key(words)}.txt"
    with suppress(OSError, UnicodeError):
        print(cached.read_text(encoding="utf-8"), end="")
        return
    output = io.StringIO()
    with redirect_stdout(output), suppress(SystemExit):
        make()
    print(output.getvalue(), end="")
    with suppress(OSError):  # without a writable cache, the help is generated each time
        cached.parent.mkdir(parents=True, exist_ok=True)
        own = cached.with_suffix(f".{os.getpid()}")  # several processes may generate the same text at once
        own.write_text(output.getvalue(), encoding="utf-8")
        own.replace(cached)


def cache_folder() -> Path:
    """The folder of the cached texts: `rlrt_lightning` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlrt_lightning"


def _key(words: Sequence[str]) -> str:
    package = Path(__file__).resolve().parents[1]
    files = sorted({*package.rglob("*.py"), *(package.parent / "callbacks").glob("*.py")})
    parts = [*words, sys.version, str(shutil.get_terminal_size().columns), str(sys.stdout.isatty())]
    parts += [f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}" for path in files]
    for name in TEXT_PACKAGES:
        with suppress(PackageNotFoundError):
            parts.append(f"{name} {version(name)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
