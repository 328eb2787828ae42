"""`--model.method.help` without a class: the classes that the setting accepts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

from rlrt_lightning.cli.types import is_component, parts, subclasses


def setting_of(words: Sequence[str]) -> str | None:
    """The setting whose classes a command line asks for; None if it asks for something else.

    Args:
        words: Command-line arguments.
    """
    for word, after in zip(words, [*words, "--"][1:], strict=True):
        if word.startswith("--") and word.endswith(".help") and after.startswith("--"):
            return word.removeprefix("--").removesuffix(".help")
    return None


def class_list(setting: str, type_: Any) -> str | None:
    """The classes that a setting accepts, a line each, and how to see their settings; None if it accepts none.

    Args:
        setting: The full name of the setting.
        type_: Its type.
    """
    bases = [part for part in parts(type_) if is_component(part)]
    found = {cls for base in bases for cls in (base, *subclasses(base)) if not inspect.isabstract(cls)}
    if not found:
        return None
    width = max(len(cls.__name__) for cls in found)
    lines = [f"  {cls.__name__:<{width}}  {_summary(cls)}" for cls in sorted(found, key=lambda cls: cls.__name__)]
    return "\n".join([f"{setting} is one of:", *lines, f"Settings of a class: --{setting}.help NAME"])


def _summary(cls: type) -> str:
    """The beginning of a docstring, up to the first colon or the end of the first sentence."""
    first = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    return re.split(r": |(?<!Eqs)(?<!Sec)\. ", first)[0].rstrip(".")
