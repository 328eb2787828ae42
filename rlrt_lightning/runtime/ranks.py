"""What several ranks tell each other beside gradients."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks; 1 without torch.distributed."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """Number of this rank, from 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def gather(value: T) -> list[T]:
    """What each rank has, on every rank; all ranks have to call."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of each rank's values, on the CPU, in the order of the ranks, so that all ranks get the same digits."""
    return torch.stack(gather(values.detach().cpu())).sum(0)


def of_first_rank(value: T) -> T:
    """What the first rank has, on every rank; each waits for it."""
    if world_size() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


class Mean(float):
    """A mean that knows how many values it is the mean of.

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
    """Each metric over the ranks that have it, so that all ranks log the same tags: where one logs a tag that another
    does not have, both wait for ever.

    A `Mean` counts by the number of its values, and is left out where it has none; other metrics count the same from
    each rank. Of a tag that ends in `_max` it is the largest. A label that no rollout of a rank has has a share of 0
    there."""
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
