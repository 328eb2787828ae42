"""The trainer's precision for computations outside Lightning's own steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision


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
