"""Communication between ranks, besides gradients."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """The number of ranks; 1 without torch.distributed."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """The index of this rank, from 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def gather(value: T) -> list[T]:
    """Gathers the value of each rank, in rank order, on every rank. All ranks must call it."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sums the values over ranks on the CPU. The order of summation is fixed, so all ranks get identical results."""
    return torch.stack(gather(values.detach().cpu())).sum(0)


def of_first_rank(value: T) -> T:
    """The value of rank 0, on every rank. All ranks must call it and wait for rank 0."""
    if world_size() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


class Mean(float):
    """A mean together with the number of values it was taken over.

    Args:
        value: The mean.
        of: The number of values.
    """

    of: float

    def __new__(cls, value: float, of: float) -> Mean:
        """See the class."""
        mean = super().__new__(cls, value)
        mean.of = float(of)
        return mean

    def __reduce__(self) -> tuple[type[Mean], tuple[float, float]]:
        return Mean, (float(self), self.of)


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Averages each metric over the ranks that have it, so that all ranks log the same tags. Lightning would deadlock
    on a tag that some ranks do not log.

    A `Mean` is weighted by its number of values and omitted if it has none; other metrics have equal weight on each
    rank. For a tag that ends in `_max` the result is the maximum. A label (`labels/...`) that a rank lacks counts as 0.
    """
    every = gather(values)
    over_ranks = {}
    for tag in dict.fromkeys(tag for metrics in every for tag in metrics):
        found = [metrics.get(tag, 0.0) for metrics in every if tag in metrics or tag.startswith("labels/")]
        weights = [getattr(value, "of", 1.0) for value in found]
        if tag.endswith("_max"):
            over_ranks[tag] = float(max(found))
        else:
            total = sum(w * value for w, value in zip(weights, found, strict=True))
            if any(weights):
                over_ranks[tag] = total / sum(weights)
    return over_ranks
