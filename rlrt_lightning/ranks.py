"""What several ranks tell each other beside gradients."""

from __future__ import annotations

from typing import TypeVar

import torch
from lightning import Trainer

T = TypeVar("T")


def gather(trainer: Trainer, value: T) -> list[T]:
    """What each rank has, on every rank."""
    if trainer.world_size == 1:
        return [value]
    values: list[T | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def of_first_rank(value: T) -> T:
    """What the first rank has, on every rank; each waits for it."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


class Mean(float):
    """A mean, which remembers of how many.

    Args:
        value: The mean.
        of: How many values it is the mean of.
    """

    of: float

    def __new__(cls, value: float, of: float) -> Mean:
        """See the class."""
        mean = super().__new__(cls, value)
        mean.of = float(of)
        return mean

    def __reduce__(self) -> tuple[type[Mean], tuple[float, float]]:
        return Mean, (float(self), self.of)


def mean_over_ranks(trainer: Trainer, values: dict[str, float]) -> dict[str, float]:
    """Each figure over the ranks that have it, so that all ranks log the same tags: where one logs a tag that another
    does not have, both wait for ever.

    A `Mean` counts by how many values it is of, and is left out where it is of none; other figures count the same from
    each rank. Of a tag that ends in `_max` it is the largest. A label that no roll-out of a rank has has a share of 0
    there."""
    every = gather(trainer, values)
    over_ranks = {}
    for tag in dict.fromkeys(tag for figures in every for tag in figures):
        found = [figures.get(tag, 0.0) for figures in every if tag in figures or tag.startswith("labels/")]
        weights = [getattr(value, "of", 1.0) for value in found]
        if tag.endswith("_max"):
            over_ranks[tag] = max(found)
        else:
            total = sum(w * value for w, value in zip(weights, found, strict=True))
            if any(weights):
                over_ranks[tag] = total / sum(weights)
    return over_ranks
