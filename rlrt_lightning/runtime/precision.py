"""The trainer's precision for what happens outside of Lightning's own steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision


@contextmanager
def computing(trainer: Any) -> Iterator[None]:
    """The trainer's autocast, which Lightning itself enters for its own steps only; new tensors are float32, which
    Lightning changes under `--trainer.precision=bf16-true`."""
    precision = trainer.precision_plugin
    context = precision.forward_context() if isinstance(precision, MixedPrecision) else nullcontext()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with context:
            yield
    finally:
        torch.set_default_dtype(before)
