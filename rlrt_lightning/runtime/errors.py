"""The one error that the user can mend: a wrong setting or a wrong input."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A setting or an input is wrong. The message names it and says what to do; the command line prints it as one
    line and ends with exit code 2."""


def first_line(error: BaseException) -> str:
    """What an error says first; libraries add pages."""
    return str(error).strip().split("\n")[0]


def check_ranges(where: str, ranges: Mapping[str, tuple[Any, bool, str]]) -> None:
    """Refuses settings that are out of range.

    Args:
        where: What they are the settings of, as in `data`.
        ranges: By name the value, whether it is good (false for NaN), and the range in words.

    Raises:
        ConfigError: Naming the first that is not.
    """
    for name, (value, good, range_) in ranges.items():
        if not good:
            raise ConfigError(f"{where}.{name} is {value}; it has to be {range_}")


def check_finite(settings: Any, name: str = "") -> None:
    """Refuses numbers that are not finite: comparisons with NaN are false, so that limits let it pass.

    Args:
        settings: Settings by name, nested as in a config.
        name: What they are the value of.

    Raises:
        ConfigError: Naming the setting.
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
