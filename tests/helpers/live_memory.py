"""The memory of the tensors that exist while a block runs, on any device and without a clock, and a training pass to
measure."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from rlrt_lightning import Policy
from rlrt_lightning.policy import memory


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of new tensors from their creation until they are freed, also those of the backward pass.

    Args:
        existing: Tensors that are not counted.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in existing}
        self._now = 0
        self.peak = 0
        """The most bytes that existed at the same time."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


def training_pass(policy: Policy, rows: int, length: int, half: bool) -> tuple[Callable[[], None], float]:
    """A training pass of random tokens, and the bytes that it is estimated to need.

    Args:
        policy: A policy with the embedded tokenizer.
        rows: Number of sequences.
        length: Tokens of each.
        half: Whether it runs under bfloat16 autocast.
    """
    device, weight = policy.device, next(policy.model.parameters()).itemsize
    ids = torch.randint(2, 57, (rows, length), device=device)
    mask = torch.ones_like(ids)
    response = (torch.arange(length, device=device) >= 16).expand(rows, -1)

    def train() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logp, entropy = policy.log_probs(ids, mask, response)
        (logp + entropy).sum().backward()

    parts = memory.training_pass(
        memory.Shape.of(policy.model, policy.attention, device.type, 2 if half else None),
        rows * length,
        length,
        policy.tokens_with_logits(rows * length),
        weight,
        2 if half else weight,
        policy.gradient_checkpointing,
    )
    return train, sum(parts.values()) + memory.cast_weights(policy.model, 2 if half else weight)
