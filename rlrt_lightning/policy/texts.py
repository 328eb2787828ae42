"""Preparing texts as the teacher's context: removing the thinking, and truncating to a limit."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

OPENING_TAG, CLOSING_TAG = "<think>", "</think>"

MARK = " ... "
"""Replaces the middle of a truncated text."""

MIN_CHARACTERS = 16
"""A text truncated to fewer characters than this is dropped."""

_TAG = re.compile(r"<(/?)think>")


def without_thinking(text: str, inside: bool = False) -> str:
    """Removes `<think>` blocks from a text; a text without blocks is unchanged.

    Blocks may be nested. An unclosed block extends to the end of the text. If the first tag is a closing tag, the text
    begins inside a block; a closing tag after all blocks are closed is text.

    Args:
        text: The text.
        inside: Whether the text begins inside a block that the prompt has opened.
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
    """Index of the tag that closes a block whose opening tag precedes tag `first`; None if no closing tag follows."""
    depth, last = 1, None
    for i in range(first, len(tags)):
        if tags[i][1]:
            depth, last = depth - 1, i
        else:
            depth += 1
        if depth == 0:
            return i
    return last  # surplus opening tags are mentions of the tag within the thinking


def shortened(text: str, excess: Callable[[str], int], tokens: int) -> str:
    """Truncates a text in its middle, where a mark is inserted; the end is kept because it usually has the answer.

    Args:
        text: The text.
        excess: Number of tokens by which a text exceeds the limit; 0 or less if it fits.
        tokens: Number of tokens of the whole text.

    Returns:
        The truncated text, empty if fewer than `MIN_CHARACTERS` would be left.
    """
    characters_per_token = len(text) / max(tokens, 1)
    kept, short = len(text), text
    while (over := excess(short)) > 0:
        kept -= max(1, int(over * characters_per_token))
        if kept < MIN_CHARACTERS:
            return ""
        head = kept // 3
        short = text[:head] + MARK + text[len(text) - (kept - head) :]
    return short
