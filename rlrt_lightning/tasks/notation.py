"""Values that data files hold as text: in JSON, or in Python's own notation, as pandas writes them into CSV files."""

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
    """A key that stands twice in one object, so that one of its values would be lost.

    Args:
        key: The key.
    """

    def __init__(self, key: Any) -> None:
        shown = str(key)[:100].encode("utf-8", "backslashreplace").decode()
        super().__init__(f"an object has the key {shown!r} twice")


def first_repeated(names: Iterable[Any]) -> Any:
    """The first name that stands twice; None if there is none."""
    seen = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def loads(text: str) -> Any:
    """Reads JSON.

    Raises:
        RepeatedKey: If an object in it has a key twice.
        ValueError: If it is no JSON.
        RecursionError: If it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise RepeatedKey(first_repeated(key for key, _ in pairs))
    return row


def _literal(text: str) -> Any:
    """Reads Python's notation for lists, dicts, texts and numbers; nothing is run.

    Raises:
        RepeatedKey: If a dict in it has a key twice.
        ValueError: If it is anything else, or has two texts side by side, which Python takes for one and numpy prints
            for two.
    """
    try:
        with warnings.catch_warnings():  # of backslashes
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval")
            value = ast.literal_eval(tree)
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline)]
    except (SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError) as error:
        raise ValueError(str(error)) from None
    kinds = [kind for kind in kinds if kind != tokenize.NL]
    if any(pair == (tokenize.STRING, tokenize.STRING) for pair in itertools.pairwise(kinds)):
        raise ValueError("two texts side by side")
    for node in ast.walk(tree):
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)] if isinstance(node, ast.Dict) else []
        if (repeated := first_repeated(keys)) is not None:
            raise RepeatedKey(repeated)
    return value


def parsed(text: str) -> Any:
    """What a text is in JSON or in Python's notation; the text itself if it is neither.

    Raises:
        RepeatedKey: If a dict in it has a key twice.
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
    """The list that a text is in JSON or in Python's notation, if it begins with a text in quotes; else None.

    Raises:
        ValueError: If it looks like such a list but cannot be read, as numpy prints one.
    """
    if not re.match(r"\s*\[\s*(?:[\"']|None|null)", text):
        return None
    value = parsed(text)
    if isinstance(value, str) and re.search(r"(?:[\"']|None|null)\s*\]\s*$", text):
        raise ValueError("looks like a list of texts but is neither JSON nor Python's notation; write it as JSON")
    return value if isinstance(value, list) else None
