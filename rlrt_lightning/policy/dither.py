"""Dither: lets updates that are smaller than a rounding step pass through the rounding to half precision.

The weights of a bfloat16 checkpoint are on the grid of bfloat16. If they are trained in float32 and rounded to bfloat16
in each forward pass (`--trainer.precision=bf16-mixed`), the model does not change until updates add up to half a step
of the grid, 0.2 to 0.4 % of a weight: at a learning rate of 1e-6, for 40 to 80 steps of a weight of 0.02.

Dither moves each weight to a random point of the interval that is rounded to its grid point. The rounded weights are
the same, and an update of a tenth of a step changes one rounded weight in ten by a whole step: the right change on
average over the many weights of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlrt_lightning.policy.sharding import decoder_layers, local, shard_rows
from rlrt_lightning.runtime.seeding import generator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PERIOD = 1_000_003
"""Number of random offsets, repeated over the elements of a tensor. A prime, so that rows of a matrix differ."""


@torch.no_grad()
def dither(model: PreTrainedModel, dtype: torch.dtype, gathered: bool = False) -> None:
    """Moves the trained float32 weights of the decoder layers that forward passes round. Other weights, such as
    embeddings and head, are used in float32.

    Args:
        model: The model. Shards of its weights are moved as if the weights were whole.
        dtype: The half precision of the forward passes.
        gathered: Whether FSDP gathers the decoder layers in `dtype`, which rounds all their weights. Autocast rounds
            those of linear layers.
    """
    for weight in _rounded_weights(model, gathered):
        first = shard_rows(weight).start if isinstance(weight, DTensor) else 0
        shard = local(weight)
        shard.copy_(dithered(shard, dtype, first * shard.shape[1:].numel()))


def _rounded_weights(model: PreTrainedModel, gathered: bool) -> Iterator[Tensor]:
    from transformers.pytorch_utils import Conv1D

    for layer in decoder_layers(model):
        for module in layer.modules():
            if gathered or isinstance(module, (nn.Linear, Conv1D)):
                for weight in module.parameters(recurse=False):
                    if weight.requires_grad and weight.dtype == torch.float32:
                        yield weight


def dithered(weight: Tensor, dtype: torch.dtype, start: int = 0) -> Tensor:
    """Moves each weight on the grid of `dtype` to a random number that is rounded to it, uniformly distributed on each
    side. Zeros and weights that are not on the grid stay as they are. The offset depends on an element's position only.

    Args:
        weight: The weights, contiguous.
        dtype: A half precision.
        start: Position of the first element in the whole tensor, if this is a shard.

    Returns:
        float32, in the shape of `weight`.
    """
    moved = torch.empty_like(weight, dtype=torch.float32)
    unused = int(math.log2(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps))  # last bits of float32
    noise = (_noise().to(weight.device) >> (16 - unused)).roll(-start % PERIOD)
    for values, out in zip(weight.reshape(-1).split(PERIOD), moved.view(-1).split(PERIOD), strict=True):
        exact = values.float()
        bits = exact.view(torch.int32)
        # The next numbers of float32 have the next integers as bits, also where the distance between them changes.
        near = (bits + noise[: len(bits)]).view(torch.float32)
        moves = (bits & (2**unused - 1) == 0) & (exact != 0) & (near.to(dtype) == exact.to(dtype))
        out.copy_(torch.where(moves, near, exact))
    return moved


@cache
def _noise() -> Tensor:
    half = 2**15
    return torch.randint(1 - half, half, (PERIOD,), generator=generator(0, "dither"), dtype=torch.int32)
