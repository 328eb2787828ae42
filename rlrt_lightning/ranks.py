"""What several ranks tell each other beside gradients."""

from __future__ import annotations

from statistics import fmean
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


def mean_over_ranks(trainer: Trainer, values: dict[str, float]) -> dict[str, float]:
    """The mean of each figure over the ranks that have it, so that all ranks log the same tags: where one logs a tag
    that another does not have, both wait for ever. A label that no roll-out of a rank has has a share of 0 there."""
    every = gather(trainer, values)
    tags = dict.fromkeys(tag for figures in every for tag in figures)
    return {
        tag: fmean(figures.get(tag, 0.0) for figures in every if tag in figures or tag.startswith("labels/"))
        for tag in tags
    }
