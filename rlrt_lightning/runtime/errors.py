"""`ConfigError`, and checks that raise it."""

from __future__ import annotations

import difflib
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any


class ConfigError(ValueError):
    """A setting or an input is wrong. The message names it and says what to do. The command line prints the message as
    one line and exits with code 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, which can run to pages."""
    return str(error).strip().split("\n")[0]


def did_you_mean(word: str, known: Sequence[str], default: Sequence[str] = ()) -> str:
    """The hint ` (did you mean ...?)` for an unknown name.

    Args:
        word: The unknown name.
        known: The valid names.
        default: Its first name is suggested if no known name is similar; without it the hint is empty.
    """
    close = difflib.get_close_matches(word, known, n=1) or default
    return f" (did you mean {close[0]}?)" if close else ""


def check_ranges(where: str, ranges: Mapping[str, tuple[Any, bool, str]]) -> None:
    """Refuses settings that are out of range.

    Args:
        where: Prefix of the settings' names, such as `data`.
        ranges: By name: the value, whether it is valid (false for NaN), and the range in words.

    Raises:
        ConfigError: For the first setting that is out of range.
    """
    for name, (value, valid, range_) in ranges.items():
        if not valid:
            raise ConfigError(f"{where}.{name} is {value}; it has to be {range_}")


def check_finite(settings: Any, name: str = "") -> None:
    """Refuses non-finite numbers. Comparisons with NaN are false, so range checks may not catch it.

    Args:
        settings: Settings by name, nested as in a config.
        name: Name of the setting that holds them.

    Raises:
        ConfigError: If a number is not finite.
    """
    if isinstance(settings, (dict, Namespace)):
        for key, value in (settings if isinstance(settings, dict) else vars(settings)).items():
            inside = name if key in ("class_path", "init_args", "dict_kwargs") else f"{name}.{key}".lstrip(".")
            check_finite(value, inside)
    elif isinstance(settings, (list, tuple)):
        for value in settings:
            check_finite(value, name)
    elif isinstance(settings, float) and not math.isfinite(settings):
        raise ConfigError(f"{name} is {settings}; it has to be a finite number")
