"""Names of the configs that ship with the package: `--config recipes/gsm8k-qwen3-0.6b`, from any folder."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from rlrt_lightning.runtime.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
FOLDER = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir())
"""The configs of the installed package, or of the clone."""


def names() -> list[str]:
    """Names of the shipped configs: their paths in `configs/` without the suffix. Files that hold one section of
    another config are not included."""
    found = (path.relative_to(FOLDER) for path in FOLDER.rglob("*.yaml"))
    return sorted(path.with_suffix("").as_posix() for path in found if path.stem not in ("data", "trainer"))


def with_config_files(words: Sequence[str]) -> list[str]:
    """Replaces the names of shipped configs by their paths.

    Args:
        words: Command-line arguments.

    Raises:
        ConfigError: If there is neither a file nor a shipped config of that name.
    """
    done: list[str] = []
    for word in words:
        if word.startswith("--config="):
            word = f"--config={_file(word.removeprefix('--config='))}"
        elif done and done[-1] == "--config":
            word = _file(word)
        done.append(word)
    return done


def _file(name: str) -> str:
    if Path(name).exists() or name in ("null", "None") or "\n" in name or "{" in name:
        return name
    shipped = names()
    # `configs/rlrt.yaml` is the path in a clone.
    short = name.removeprefix("configs/").removesuffix(".yaml")
    if short in shipped:
        return str(FOLDER / f"{short}.yaml")
    near = difflib.get_close_matches(short, shipped, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ConfigError(
        f"config: there is no file {name}{hint}; configs that ship with the package: {', '.join(shipped)}"
    )
