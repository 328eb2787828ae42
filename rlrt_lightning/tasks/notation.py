"""Parsing of values stored as text: JSON, or Python literals as pandas writes them to CSV files."""

from __future__ import annotations

import ast
import io
import itertools
import json
import re
import tokenize
import warnings
from collections.abc import Iterable
from typing import Any


class RepeatedKey(ValueError):
    """A key occurs twice in one object, so that one of its values would be lost.

    Args:
        key: The key.
    """

    def __init__(self, key: Any) -> None:
        shown = str(key)[:100].encode("utf-8", "backslashreplace").decode()
        super().__init__(f"an object has the key {shown!r} twice")


def first_repeated(names: Iterable[Any]) -> Any:
    """The first name that occurs twice; None if there is none."""
    seen = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def loads(text: str) -> Any:
    """Parses JSON.

    Raises:
        RepeatedKey: If an object has a key twice.
        ValueError: If the text is not JSON.
        RecursionError: If it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise RepeatedKey(first_repeated(key for key, _ in pairs))
    return row


def _literal(text: str) -> Any:
    """Parses a Python literal of lists, dicts, strings and numbers; no code is executed.

    Raises:
        RepeatedKey: If a dict has a key twice.
        ValueError: If the text is anything else, or has two adjacent strings: Python concatenates them, but in numpy's
            output they are two elements.
    """
    try:
        with warnings.catch_warnings():  # invalid escape sequences
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval")
            value = ast.literal_eval(tree)
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline)]
    except (SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError) as error:
        raise ValueError(str(error)) from None
    kinds = [kind for kind in kinds if kind != tokenize.NL]
    if any(pair == (tokenize.STRING, tokenize.STRING) for pair in itertools.pairwise(kinds)):
        raise ValueError("two adjacent strings")
    for node in ast.walk(tree):
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)] if isinstance(node, ast.Dict) else []
        if (repeated := first_repeated(keys)) is not None:
            raise RepeatedKey(repeated)
    return value


def parsed(text: str) -> Any:
    """Parses text as JSON or as a Python literal; returns the text itself if it is neither.

    Raises:
        RepeatedKey: If a dict has a key twice.
    """
    for read in (loads, _literal):
        try:
            return read(text)
        except RepeatedKey:
            raise
        except (ValueError, RecursionError):
            continue
    return text


def listed(text: str) -> list[Any] | None:
    """Parses text as a JSON or Python list whose first element is a string or null; None if it is no such list.

    Raises:
        ValueError: If it looks like such a list but cannot be parsed, as in numpy's output.
    """
    if not re.match(r"\s*\[\s*(?:[\"']|None|null)", text):
        return None
    value = parsed(text)
    if isinstance(value, str) and re.search(r"(?:[\"']|None|null)\s*\]\s*$", text):
        raise ValueError("looks like a list of strings but is neither JSON nor a Python literal; write it as JSON")
    return value if isinstance(value, list) else None
