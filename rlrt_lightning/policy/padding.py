"""Padding and batching of sequences of different lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MAX_PADDING = 0.04
"""Fraction of the padded tokens in a forward pass that may be padding before the batch is cut into blocks."""


def pad_sequences(
    sequences: Sequence[tuple[list[int], list[int]]], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenates prompts and responses, and pads them on the right.

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
"""Prompts shared by several rows: token ids [G, P], padded on the left, attention mask [G, P], and the index of each
row's prompt [B]."""


def share_prompts(prompts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Shared:
    """Collects the distinct prompts of a batch's rows."""
    numbers: dict[tuple[int, ...], int] = {}
    after = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]
    longest = max(map(len, numbers))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in numbers])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in numbers])
    return ids.to(device), mask.to(device), torch.tensor(after, device=device)


def split_prompts(
    sequences: Sequence[tuple[list[int], list[int]]],
) -> list[tuple[list[int], list[int], list[int]]]:
    """Splits each prompt into a prefix, read once for all prompts that begin with it, and the rest, read again for each
    response. Prompts share a prefix only if this reduces the number of tokens; equal prompts have no rest.

    Args:
        sequences: Token ids of prompt and response.

    Returns:
        Token ids of prefix, rest and response.
    """
    rows = Counter(tuple(prompt) for prompt, _ in sequences)
    lengths: dict[tuple[int, ...], int] = {}
    cluster: list[tuple[int, ...]] = []
    length = 0
    for prompt in sorted(rows):  # neighbours have the longest common prefixes
        common = _common(cluster[0][:length], prompt) if cluster else 0
        apart = length + sum(rows[p] * (len(p) - length) for p in cluster) + len(prompt)
        together = common + sum(rows[p] * (len(p) - common) for p in (*cluster, prompt))
        cluster, length = ([*cluster, prompt], common) if common and together < apart else ([prompt], len(prompt))
        lengths |= dict.fromkeys(cluster, length)
    cuts = [lengths[tuple(prompt)] for prompt, _ in sequences]
    return [(prompt[:n], prompt[n:], response) for n, (prompt, response) in zip(cuts, sequences, strict=True)]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def scatter_rows(
    results: Sequence[Tensor], chosen: Sequence[int], lengths: Sequence[int], scores: list[tuple[Tensor, ...]]
) -> None:
    """Splits results [R, ...] of the chosen sequences' response tokens, and stores each sequence's part in `scores`.

    Args:
        results: Values of the chosen sequences' response tokens, row by row, [R, ...] each.
        chosen: Indices of the sequences.
        lengths: Number of response tokens of each sequence, also of those not chosen.
        scores: The results of all sequences.
    """
    for i, *parts in zip(chosen, *(r.cpu().split([lengths[i] for i in chosen]) for r in results), strict=True):
        scores[i] = tuple(part.clone() for part in parts)


def pad_rows(rows: Sequence[Tensor | None], width: int | None = None) -> Tensor:
    """Stacks rows of different lengths as float32 [N, T], padded with 0; None is an empty row. T is `width`, or the
    length of the longest row."""
    out = torch.zeros(len(rows), width or max((len(r) for r in rows if r is not None), default=0))
    for i, row in enumerate(rows):
        if row is not None:
            out[i, : len(row)] = row
    return out


def at_mask(values: Tensor, mask: Tensor) -> Tensor:
    """Scatters values [R] row by row to the R positions where the mask [B, T] is true; 0 elsewhere, [B, T]."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask.bool(), values)


def split(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Splits sequences, sorted by falling length, into the fewest consecutive batches of a limited size.

    Args:
        lengths: Number of tokens of each sequence.
        max_tokens: Upper bound of a batch's padded tokens (rows * longest row); a single longer sequence is a batch.

    Returns:
        Indices of the sequences in each batch, the longest first.
    """
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # The first sequence of a batch is its longest.
        if found and (len(found[-1]) + 1) * lengths[found[-1][0]] <= max_tokens:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def balance(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Splits sequences, sorted by falling length, into `parts` consecutive batches that minimize the largest padded
    size (rows * longest row). Batches may be empty if there are fewer sequences than parts.

    Args:
        lengths: Number of tokens of each sequence.
        parts: Number of batches.

    Returns:
        Indices of the sequences in each batch, the longest first.
    """
    low, high = 0, sum(lengths) + len(lengths) * max(lengths, default=0)
    while low < high:  # bisection for the smallest limit that needs at most `parts` batches
        middle = (low + high) // 2
        low, high = (low, middle) if len(split(lengths, middle)) <= parts else (middle + 1, high)
    found = split(lengths, low)
    return found + [[] for _ in range(parts - len(found))]


def blocks(lengths: Sequence[int], count: int | None = None) -> list[tuple[int, int]]:
    """Cuts rows, sorted by falling length, into blocks that are each padded to their own longest row.

    Args:
        lengths: Number of tokens of each row, falling.
        count: Number of blocks; None uses the fewest for which padding is at most `MAX_PADDING` of the padded tokens.

    Returns:
        Number of rows and width of each block, in order.
    """
    starts, ends = [0], [len(lengths)]
    padded, tokens = len(lengths) * max(lengths, default=0), sum(lengths)

    def cut(start: int, end: int) -> tuple[int, int]:  # padding saved by the best cut, and its position
        return max(((lengths[start] - lengths[i]) * (end - i), i) for i in range(start + 1, end))

    while len(starts) < count if count is not None else tokens < padded * (1 - MAX_PADDING):
        candidates = [(*cut(a, b), n) for n, (a, b) in enumerate(zip(starts, ends, strict=True)) if b - a > 1]
        saved, where, n = max(candidates)
        starts.insert(n + 1, where)
        ends.insert(n, where)
        padded -= saved
    return [(end - start, lengths[start]) for start, end in zip(starts, ends, strict=True)]


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Groups sequences of similar length into batches with little padding (see `blocks`), the longest first.

    Args:
        lengths: Number of tokens of each sequence.
        max_tokens: Upper bound of a batch's padded tokens (rows * longest row); a single longer sequence is a batch.

    Yields:
        Indices of the sequences in each batch.
    """
    for chosen in split(lengths, max_tokens):
        for size, _ in blocks([lengths[i] for i in chosen]):
            yield chosen[:size]
            chosen = chosen[size:]
