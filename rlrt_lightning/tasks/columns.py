"""Reading of prompts, ground truths and solutions from a row's columns, in the formats that data files use."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any, cast

from rlrt_lightning.tasks.answers import readable
from rlrt_lightning.tasks.base import Messages
from rlrt_lightning.tasks.notation import RepeatedKey, listed, parsed
from rlrt_lightning.tasks.patterns import found_by, last_match
from rlrt_lightning.tasks.readers import BadRow, Row, excerpt
from rlrt_lightning.tasks.rewards import Reward

# -- any column --------------------------------------------------------------------------------------------------------


def look_up(row: Row, name: str) -> Any:
    """The value of a column or of a dotted name; None if it does not exist.

    Raises:
        BadRow: If a dict stored as text along the path has a key twice.
    """
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        value = decoded(value)
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def decoded(value: Any) -> Any:
    """Parses a dict stored as text, in JSON or as a Python literal; returns anything else unchanged.

    Raises:
        BadRow: If the dict has a key twice.
    """
    if isinstance(value, str) and re.match(r"\s*\{\s*[\"']", value):
        result = _parsed(value)
        return result if isinstance(result, dict) else value
    return value


def is_empty(value: Any) -> bool:
    """Whether a value is empty: null, whitespace, an empty list or dict, or a non-finite number."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or value == {} or (isinstance(value, float) and not math.isfinite(value))


def check_text(value: Any, name: str) -> None:
    """Refuses bytes and text that cannot be encoded as UTF-8, which no tokenizer accepts."""
    if isinstance(value, (bytes, bytearray)):
        raise BadRow(f"bytes in {name} instead of text", excerpt(value))
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            near = value[max(error.start - 10, 0) : error.start + 10]
            raise BadRow(f"{name} holds bytes that are not UTF-8, or half of a surrogate pair", excerpt(near)) from None


def _parsed(text: str) -> Any:
    try:
        return parsed(text)
    except RepeatedKey as error:
        raise BadRow(str(error), excerpt(text)) from None


def extracted(pattern: re.Pattern[str], text: Any, what: str) -> str:
    """The part of a text that a pattern finds: the last match, or its first group if the pattern has groups.

    Args:
        pattern: The pattern.
        text: The text.
        what: Description of the text and the setting, for error messages.

    Raises:
        BadRow: If the value is not text, or the pattern finds nothing in it.
    """
    if not isinstance(text, str):
        raise BadRow(f"{what} finds nothing, because the value is not text but {_kind(text)}", excerpt(text))
    match = last_match(pattern, text)
    found = None if match is None else found_by(match)
    if found is None or not found.strip():
        raise BadRow(f"{what} finds nothing", excerpt(text))
    return found.strip()


# -- prompts -----------------------------------------------------------------------------------------------------------

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_BEGINS_AN_OBJECT = re.compile(r"""[\s"'\\]*(?:array\()?[\[({][\s\[({]*["'\\]+\w+["'\\]+\s*:""")
_LAYOUTS = [
    [re.compile(rf"""["']{key}\\*["']\s*:""") for key in keys] for keys in (("role", "content"), ("from", "value"))
]


def conversation(value: Any, name: str) -> str | Messages:
    """Reads a prompt: plain text, messages, or messages stored as text."""
    if is_empty(value):
        raise BadRow(f"no prompt in {name}", excerpt(value))
    messages = _messages(value, "prompt", name)
    if messages is None:
        if isinstance(value, str):
            return value
        kind = _NO_MESSAGES if isinstance(value, list) else f"is neither text nor a list of messages but {_kind(value)}"
        raise BadRow(f"the prompt in {name} {kind}", excerpt(value))
    if messages[-1]["role"] != "user":
        raise BadRow(f"the prompt in {name} does not end with a user message", excerpt(messages[-1]))
    if not messages[-1]["content"].strip():
        raise BadRow(f"no prompt in {name}", excerpt(messages[-1]))
    return messages


_NO_MESSAGES = "has items that are not messages with a role and text content"


def _kind(value: Any) -> str:
    return type(value).__name__


def _messages(value: Any, what: str, name: str) -> Messages | None:
    """Reads one message or a list of messages, with `role` and `content` or ShareGPT's `from` and `value`, possibly
    stored as text; None if the value holds no messages.

    Raises:
        BadRow: If some items are not messages, or text looks like messages but cannot be parsed.
    """
    if isinstance(value, str):
        check_text(value, name)
        if not _looks_like_messages(value):
            return None
        result = _parsed(value)
        result = _parsed(result) if isinstance(result, str) else result  # JSON encoded twice
        if isinstance(result, str):
            why = "looks like messages but is neither JSON nor a Python literal; write it as JSON"
            raise BadRow(f"the {what} in {name} {why}", excerpt(value))
        value = result
    if isinstance(value, dict):
        inner = [
            value[key] for key in ("messages", "conversations", "conversation") if isinstance(value.get(key), list)
        ]
        value = inner[0] if inner else [value]
    if not (isinstance(value, (list, tuple)) and any(map(_is_message, value))):
        return None
    return [_message(message, what, name) for message in value]


def _looks_like_messages(text: str) -> bool:
    return bool(_BEGINS_AN_OBJECT.match(text)) and any(all(key.search(text) for key in keys) for keys in _LAYOUTS)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and any(keys <= value.keys() for keys in ({"role", "content"}, {"from", "value"}))


def _message(value: Any, what: str, name: str) -> dict[str, str]:
    """Converts a message to `role` and `content`."""
    message = value
    if _is_message(value) and (value.get("role") is None and "from" in value):
        speaker = value["from"]
        role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
        message = {"role": role, "content": value["value"]}
    if not (_is_message(message) and isinstance(message["role"], str) and isinstance(message["content"], str)):
        raise BadRow(f"the {what} in {name} {_NO_MESSAGES}", excerpt(value))
    check_text(message["role"], name)
    check_text(message["content"], name)
    return cast("dict[str, str]", message)


# -- ground truths and solutions ---------------------------------------------------------------------------------------


def ground_truth(value: Any, name: str, reward: object) -> Any:
    """Reads a ground truth for the reward: text, a number, a list of these with at least one non-empty entry, or a
    dict."""
    empty = BadRow(f"no answer in {name}", excerpt(value))
    if is_empty(value) or (isinstance(value, list) and all(map(is_empty, value))):
        raise empty
    if not isinstance(value, (str, int, float, Decimal, list, dict)):
        raise BadRow(f"the answer in {name} is neither text nor a number but {_kind(value)}", excerpt(value))
    for text in value if isinstance(value, list) else [value]:
        check_text(text, name)
    truth = value.strip() if isinstance(value, str) else value
    if isinstance(reward, Reward):
        result = decoded(truth)
        try:
            truth = reward.read_truth(result if isinstance(result, dict) and "ground_truth" in result else truth)
        except ValueError as error:
            raise BadRow(f"the answer in {name} {error}", excerpt(value)) from None
    if is_empty(truth):
        raise empty
    return truth


def solution(value: Any, name: str) -> str | None:
    """Reads a reference solution: text, the last assistant message of a conversation, the first non-empty string of a
    list, or any of these stored as text; None if there is none."""
    messages = _messages(value, "solution", name)
    if messages is not None:
        replies = [message["content"] for message in messages if message["role"] == "assistant"]
        if not replies:
            raise BadRow(f"the solution in {name} has no assistant message", excerpt(value))
        value = replies[-1]
    elif isinstance(value, str):
        try:
            result = listed(value)
        except ValueError as error:
            raise BadRow(f"the solution in {name} {error}", excerpt(value)) from None
        if result is None and re.match(r"\s*[\[({][\s\[({]*'", value):
            result = _parsed(value)  # a dict or list as a Python literal must not become the teacher's context
        value = value if result is None else result
    if isinstance(value, list) and all(text is None or isinstance(text, str) for text in value):
        value = next((text for text in value if not is_empty(text)), None)
    if is_empty(value):
        return None
    if not isinstance(value, (str, int, float, Decimal)):
        hint = f"; name one of its keys, as in {name}.text" if isinstance(value, dict) else ""
        what = "neither text, messages nor a list of strings"
        raise BadRow(f"the solution in {name} is {what} but {_kind(value)}{hint}", excerpt(value))
    check_text(value, name)
    return value if isinstance(value, str) else readable(value)
