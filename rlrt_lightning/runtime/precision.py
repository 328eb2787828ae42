"""The trainer's precision for computations outside Lightning's own steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.plugins import MixedPrecision

Dtype = Literal["float32", "bfloat16", "float16"]


def half_precision(trainer: Any) -> Dtype | None:
    """The half precision that the trainer computes in: bfloat16 for `--trainer.precision=bf16-*`, float16 for `16-*`;
    None if it computes in the weights' dtype."""
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return "bfloat16"
    return "float16" if precision.startswith("16") else None


def rounding(trainer: Any) -> torch.dtype | None:
    """The half precision to which forward passes round float32 weights, in `bf16-mixed` and `16-mixed`."""
    half = half_precision(trainer) if isinstance(trainer.precision_plugin, MixedPrecision) else None
    return getattr(torch, half) if half else None


@contextmanager
def computing(trainer: Any) -> Iterator[None]:
    """Enters the trainer's autocast, which Lightning applies only to its own steps. New tensors are float32, whereas
    `--trainer.precision=bf16-true` changes the default dtype."""
    precision = trainer.precision_plugin
    context = precision.forward_context() if isinstance(precision, MixedPrecision) else nullcontext()
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with context:
            yield
    finally:
        torch.set_default_dtype(previous)
