"""Regular expressions that find an answer or a question in a text."""

from __future__ import annotations

import re
from collections import deque

from rlrt_lightning.runtime.errors import ConfigError


def compiled(pattern: str, setting: str) -> re.Pattern[str]:
    """A pattern in which the dot matches line breaks.

    Raises:
        ConfigError: If it is not a regular expression; the message begins with the name of the setting.
    """
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"{setting} {pattern!r} is not a regular expression: {error}") from None


def last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last match in a text."""
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def found_by(match: re.Match[str]) -> str | None:
    """What a match found: its first group if the pattern has groups, None if this group matches nothing."""
    return match[1 if match.re.groups else 0]
