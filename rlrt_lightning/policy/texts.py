"""Texts as the teacher's context: without the thinking, and no longer than there is room for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

OPENING_TAG, CLOSING_TAG = "<think>", "</think>"

MARK = " ... "
"""Stands where the middle of a text was cut out."""

LEAST = 16
"""Fewer characters of a text than this are of no use to a reader."""

_TAG = re.compile(r"<(/?)think>")


def without_thinking(text: str, inside: bool = False) -> str:
    """A text without its `<think>` blocks; unchanged where it has none.

    Blocks may be nested. One that is never closed reaches to the end of the text. A closing tag before any opening one
    ends thinking that the text begins in; a closing tag after a block is closed is text.

    Args:
        text: The text.
        inside: Whether the text begins inside a block, which the prompt has opened.
    """
    tags = list(_TAG.finditer(text))
    inside = inside or bool(tags and tags[0][1])
    if not inside and not tags:
        return text
    kept, start, i = [], 0, 0
    while True:
        if not inside:
            while i < len(tags) and tags[i][1]:
                i += 1
            if i == len(tags):
                kept.append(text[start:])
                break
            kept.append(text[start : tags[i].start()])
            i += 1
        inside = False
        end = _end_of_block(tags, i)
        if end is None:
            break
        start, i = tags[end].end(), end + 1
    return "".join(kept).strip()


def _end_of_block(tags: Sequence[re.Match[str]], first: int) -> int | None:
    """Which tag closes a block whose opening tag stands before tag number `first`; None where none does."""
    depth, last = 1, None
    for i in range(first, len(tags)):
        if tags[i][1]:
            depth, last = depth - 1, i
        else:
            depth += 1
        if depth == 0:
            return i
    return last  # an opening tag too many is one that the thinking speaks of


def shortened(text: str, excess: Callable[[str], int], tokens: int) -> str:
    """A text whose middle gives way to a mark until it fits: an answer stands at the end. It is cut between characters.

    Args:
        text: The text.
        excess: How many tokens too many a text has, 0 or less where it fits.
        tokens: Tokens of the whole text.

    Returns:
        The text, empty where nothing useful of it fits.
    """
    characters_per_token = len(text) / max(tokens, 1)
    kept, short = len(text), text
    while (over := excess(short)) > 0:
        kept -= max(1, int(over * characters_per_token))
        if kept < LEAST:
            return ""
        head = kept // 3
        short = text[:head] + MARK + text[len(text) - (kept - head) :]
    return short
