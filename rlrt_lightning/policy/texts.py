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
    blocks = _blocks(text, inside)
    if not blocks:
        return text
    starts = [0, *(end for _, _, _, end in blocks)]
    ends = [*(start for start, _, _, _ in blocks), len(text)]
    return "".join(text[start:end] for start, end in zip(starts, ends, strict=True)).strip()


def thoughts(text: str, inside: bool = False) -> list[tuple[int, int]]:
    """Where a text's thinking starts and ends, without the tags. See `without_thinking`."""
    return [(start, end) for _, start, end, _ in _blocks(text, inside)]


def opens_thinking(prompt: str) -> bool:
    """Whether the prompt ends with an opening tag, so that the response begins inside the thinking."""
    return prompt.rstrip().endswith(OPENING_TAG)


def _blocks(text: str, inside: bool) -> list[tuple[int, int, int, int]]:
    """The bounds of opening and closing tag of each `<think>` block; both bounds of a missing tag are the text's."""
    tags = list(_TAG.finditer(text))
    inside = inside or bool(tags and tags[0][1])
    found: list[tuple[int, int, int, int]] = []
    i = 0
    while True:
        opening = 0, 0
        if not inside:
            while i < len(tags) and tags[i][1]:
                i += 1
            if i == len(tags):
                return found
            opening, i = tags[i].span(), i + 1
        inside = False
        end = _end_of_block(tags, i)
        found.append((*opening, *((len(text), len(text)) if end is None else tags[end].span())))
        if end is None:
            return found
        i = end + 1


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
