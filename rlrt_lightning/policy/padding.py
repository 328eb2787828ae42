"""Sequences of different lengths as tensors, with little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

WASTE = 0.04
"""Share of the places of a forward pass that may be padding, before it is made in several blocks."""


def pad_sequences(
    sequences: Sequence[tuple[list[int], list[int]]], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Pads prompt + response on the right.

    Returns:
        Token ids (0 at padding), attention mask (1 at tokens) and response mask (true at response tokens), all [B, T].
    """
    prompts = torch.tensor([len(p) for p, _ in sequences])[:, None]
    totals = torch.tensor([len(p) + len(r) for p, r in sequences])[:, None]
    ids = torch.zeros(len(sequences), int(totals.max()), dtype=torch.long)
    for row, (prompt, response) in enumerate(sequences):
        ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
    position = torch.arange(ids.shape[1])[None]
    attention = (position < totals).long()
    response_mask = (position >= prompts) & (position < totals)
    return ids.to(device), attention.to(device), response_mask.to(device)


Shared = tuple[Tensor, Tensor, Tensor]
"""Prompts that several rows share: token ids [G, P], padded on the left, their attention mask [G, P], and which of them
each row begins with [B]."""

WORTH_SHARING = 0.9
"""A prompt is read once for the responses that share it where that leaves at most this share of the tokens."""


def worth_sharing(sequences: Sequence[tuple[list[int], list[int]]]) -> bool:
    """Whether reading each prompt once leaves clearly fewer tokens to read of some prompts with their responses."""
    prompts = {tuple(prompt) for prompt, _ in sequences}
    responses = sum(len(response) for _, response in sequences)
    whole = sum(len(prompt) for prompt, _ in sequences) + responses
    return all(prompts) and sum(map(len, prompts)) + responses < WORTH_SHARING * whole


def share_prompts(prompts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Shared:
    """The different ones among the prompts of some rows."""
    numbers: dict[tuple[int, ...], int] = {}
    after = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
    longest = max(map(len, numbers))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in numbers])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in numbers])
    return ids.to(device), mask.to(device), torch.tensor(after, device=device)


def pad_rows(rows: Sequence[Tensor | None], width: int | None = None) -> Tensor:
    """Float32 rows of different lengths side by side, [N, T], 0 where a row ends or is None; T is the longest row's
    length, or `width`."""
    out = torch.zeros(len(rows), width or max((len(r) for r in rows if r is not None), default=0))
    for i, row in enumerate(rows):
        if row is not None:
            out[i, : len(row)] = row
    return out


def at_mask(values: Tensor, mask: Tensor) -> Tensor:
    """Values [R] in reading order at the R places where a mask [B, T] is true, 0 elsewhere, [B, T]."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask.bool(), values)


def balance(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Deals sequences out to `parts` padded batches whose largest (rows times longest) is as small as can be while
    similar lengths stay together, each with its longest first. A part may be empty if there are fewer sequences than
    parts.

    Args:
        lengths: Tokens of each sequence.
        parts: How many batches.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def deal(limit: int) -> list[list[int]]:
        dealt: list[list[int]] = []
        for i in order:
            # In falling order the first of a part is its longest.
            if dealt and (len(dealt[-1]) + 1) * lengths[dealt[-1][0]] <= limit:
                dealt[-1].append(i)
            else:
                dealt.append([i])
        return dealt

    low, high = 0, sum(lengths) + len(lengths) * max(lengths, default=0)
    while low < high:  # the smallest limit that needs no more than `parts`
        middle = (low + high) // 2
        low, high = (low, middle) if len(deal(middle)) <= parts else (middle + 1, high)
    dealt = deal(low)
    return dealt + [[] for _ in range(parts - len(dealt))]


def blocks(lengths: Sequence[int], count: int | None = None) -> list[tuple[int, int]]:
    """Cuts rows in falling order of length into blocks, each of which is padded to its own longest row only.

    Args:
        lengths: Tokens of each row, falling.
        count: How many blocks; None takes so few that no more than `WASTE` of their places are padding.

    Returns:
        Rows and width of each block, in order.
    """
    starts, ends = [0], [len(lengths)]
    places, tokens = len(lengths) * max(lengths, default=0), sum(lengths)

    def cut(start: int, end: int) -> tuple[int, int]:  # places that the best cut saves, and where it is
        return max(((lengths[start] - lengths[i]) * (end - i), i) for i in range(start + 1, end))

    while len(starts) < count if count is not None else tokens < places * (1 - WASTE):
        candidates = [(*cut(a, b), n) for n, (a, b) in enumerate(zip(starts, ends, strict=True)) if b - a > 1]
        saved, where, n = max(candidates)
        starts.insert(n + 1, where)
        ends.insert(n, where)
        places -= saved
    return [(end - start, lengths[start]) for start, end in zip(starts, ends, strict=True)]


def batches(lengths: Sequence[int], most_places: int) -> Iterator[list[int]]:
    """Deals sequences out to padded batches of similar length and at most so many places, the longest first, as many
    as it takes to have little padding (`blocks`).

    Args:
        lengths: Tokens of each sequence.
        most_places: Rows times longest row of a batch; one row may have more.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        rows = max(1, most_places // max(1, lengths[order[0]]))
        chosen, order = order[:rows], order[rows:]
        for size, _ in blocks([lengths[i] for i in chosen]):
            yield chosen[:size]
            chosen = chosen[size:]
