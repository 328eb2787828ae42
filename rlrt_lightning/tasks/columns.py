"""What a row's columns hold, in the spellings that data files have for it: prompts, ground truths, solutions."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any, cast

from rlrt_lightning.tasks.answers import readable
from rlrt_lightning.tasks.base import Messages
from rlrt_lightning.tasks.notation import RepeatedKey, listed, parsed
from rlrt_lightning.tasks.readers import BadRow, Row, excerpt
from rlrt_lightning.tasks.rewards import Reward

# -- any column --------------------------------------------------------------------------------------------------------


def look_up(row: Row, name: str) -> Any:
    """The value of a column, or of what a dotted name points to; None if it is not there.

    Raises:
        BadRow: If a text on the way holds a dict that has a key twice.
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
    """The dict that a text holds, in JSON or as Python prints it; anything else as it is.

    Raises:
        BadRow: If the dict has a key twice.
    """
    if isinstance(value, str) and re.match(r"\s*\{\s*[\"']", value):
        inside = _parsed(value)
        return inside if isinstance(inside, dict) else value
    return value


def is_empty(value: Any) -> bool:
    """Whether a column holds nothing: null, white space, an empty list or dict, a number that is not finite."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or value == {} or (isinstance(value, float) and not math.isfinite(value))


def check_text(value: Any, name: str) -> None:
    """Refuses what no tokenizer reads: bytes, and text that UTF-8 cannot hold."""
    if isinstance(value, (bytes, bytearray)):
        raise BadRow(f"bytes in {name} where text belongs", excerpt(value))
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


# -- prompts -----------------------------------------------------------------------------------------------------------

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_BEGINS_AN_OBJECT = re.compile(r"""[\s"'\\]*(?:array\()?[\[({][\s\[({]*["'\\]+\w+["'\\]+\s*:""")
_LAYOUTS = [
    [re.compile(rf"""["']{key}\\*["']\s*:""") for key in keys] for keys in (("role", "content"), ("from", "value"))
]


def conversation(value: Any, name: str) -> str | Messages:
    """A prompt in one of its spellings: text, messages, or messages as text. Any other text is just text."""
    if is_empty(value):
        raise BadRow(f"no prompt in {name}", excerpt(value))
    messages = _messages(value, "prompt", name)
    if messages is None:
        if isinstance(value, str):
            return value
        kind = _NO_MESSAGES if isinstance(value, list) else f"is neither text nor a list of messages but {_kind(value)}"
        raise BadRow(f"the prompt in {name} {kind}", excerpt(value))
    if messages[-1]["role"] != "user":
        raise BadRow(f"the prompt in {name} does not end with a message of the user", excerpt(messages[-1]))
    if not messages[-1]["content"].strip():
        raise BadRow(f"no prompt in {name}", excerpt(messages[-1]))
    return messages


_NO_MESSAGES = "holds something else than messages with a role and a content in text"


def _kind(value: Any) -> str:
    return type(value).__name__


def _messages(value: Any, what: str, name: str) -> Messages | None:
    """The messages that a column holds: a list of them or a single one, with `role` and `content` or ShareGPT's `from`
    and `value`, as they are or as text; None if it holds something else.

    Raises:
        BadRow: If some of them are no messages, or a text looks like messages but cannot be read.
    """
    if isinstance(value, str):
        check_text(value, name)
        if not _looks_like_messages(value):
            return None
        inside = _parsed(value)
        inside = _parsed(inside) if isinstance(inside, str) else inside  # JSON in JSON
        if isinstance(inside, str):
            why = "looks like messages but is neither JSON nor Python's notation; write it as JSON"
            raise BadRow(f"the {what} in {name} {why}", excerpt(value))
        value = inside
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
    """A message with a role and a content."""
    message = value
    if _is_message(value) and (value.get("role") is None and "from" in value):
        speaker = value["from"]
        role = _SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
        message = {"role": role, "content": value["value"]}
    if not (_is_message(message) and isinstance(message["role"], str) and isinstance(message["content"], str)):
        raise BadRow(f"the {what} in {name} {_NO_MESSAGES}", excerpt(value))
    check_text(message["role"], name)
    check_text(message["content"], name)
    return cast("dict[str, str]", message)


# -- ground truths and solutions ---------------------------------------------------------------------------------------


def ground_truth(value: Any, name: str, reward: object) -> Any:
    """A ground truth: text, a number, a list of these that are not all empty, or a dict, as the reward takes it."""
    empty = BadRow(f"no answer in {name}", excerpt(value))
    if is_empty(value) or (isinstance(value, list) and all(map(is_empty, value))):
        raise empty
    if not isinstance(value, (str, int, float, Decimal, list, dict)):
        raise BadRow(f"the answer in {name} is neither text nor a number but {_kind(value)}", excerpt(value))
    for text in value if isinstance(value, list) else [value]:
        check_text(text, name)
    truth = value.strip() if isinstance(value, str) else value
    if isinstance(reward, Reward):
        inside = decoded(truth)
        try:
            truth = reward.read_truth(inside if isinstance(inside, dict) and "ground_truth" in inside else truth)
        except ValueError as error:
            raise BadRow(f"the answer in {name} {error}", excerpt(value)) from None
    if is_empty(truth):
        raise empty
    return truth


def solution(value: Any, name: str) -> str | None:
    """A reference solution as text, None if there is none: a text, what the assistant says last in messages, the first
    of a list of texts, or any of these as text."""
    messages = _messages(value, "solution", name)
    if messages is not None:
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        if not said:
            raise BadRow(f"the solution in {name} holds no message of the assistant", excerpt(value))
        value = said[-1]
    elif isinstance(value, str):
        try:
            inside = listed(value)
        except ValueError as error:
            raise BadRow(f"the solution in {name} {error}", excerpt(value)) from None
        if inside is None and re.match(r"\s*[\[({][\s\[({]*'", value):
            inside = _parsed(value)  # a dict or a list as Python prints it, which no teacher should read
        value = value if inside is None else inside
    if isinstance(value, list) and all(text is None or isinstance(text, str) for text in value):
        value = next((text for text in value if not is_empty(text)), None)
    if is_empty(value):
        return None
    if not isinstance(value, (str, int, float, Decimal)):
        of_dict = f"; name one of its keys, as in {name}.text" if isinstance(value, dict) else ""
        what = "neither text, messages nor a list of texts"
        raise BadRow(f"the solution in {name} is {what} but {_kind(value)}{of_dict}", excerpt(value))
    check_text(value, name)
    return value if isinstance(value, str) else readable(value)
