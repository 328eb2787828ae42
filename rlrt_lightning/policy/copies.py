"""Frozen copies of the policy's weights: the teacher's, and those of the reference for the KL divergence."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from rlrt_lightning.objective import TeacherWeights
from rlrt_lightning.policy.lora import TeacherAdapters
from rlrt_lightning.policy.sharding import FSDP2Strategy, local, move_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlrt_lightning.policy.model import Policy


class FrozenWeights(nn.Module):
    """The policy's weights as of an earlier time; `Policy.weights_of` runs the model with them.

    With adapters (`model.policy.lora`), the initial weights are the model without adapters; weights that follow the
    policy are a copy of the adapters only.

    Args:
        rest_on_cpu: Keep a full copy in CPU memory except while it scores.
        schedule: When the weights are refreshed.
    """

    model: PreTrainedModel
    """The copy; set only if it is a full one."""

    def __init__(self, rest_on_cpu: bool = False, schedule: TeacherWeights = TeacherWeights()) -> None:
        super().__init__()
        self.rest_on_cpu = rest_on_cpu
        self.schedule = schedule
        self.adapters: TeacherAdapters | None = None

    @property
    def weights(self) -> Literal["policy", "initial", "own"]:
        """See `TeacherWeights.kind`."""
        return self.schedule.kind

    def load(self, policy: Policy, strategy: FSDP2Strategy | None = None) -> None:
        """Copies the policy's weights if the schedule needs a copy. If the policy has adapters, only they are copied,
        or nothing for initial weights. A copy that is no longer needed is freed.

        Args:
            policy: The policy, with its weights.
            strategy: Shards the copy if the policy's weights are sharded.
        """
        if self.weights == "policy" and hasattr(self, "model"):
            del self.model
        if self.adapters is not None and (self.weights == "policy" or self.adapters.off != (self.weights == "initial")):
            self.adapters = None
        if self.weights == "policy" or self.adapters is not None or hasattr(self, "model"):
            return
        if policy.lora is not None:
            self.adapters = TeacherAdapters(policy.model, off=self.weights == "initial")
        elif strategy is not None and isinstance(policy.model, FSDPModule):
            self.model = policy.sharded_copy(strategy)
        else:
            self.model = copy.deepcopy(policy.model).eval().requires_grad_(False)

    @contextmanager
    def applied_to(self, policy: Policy) -> Iterator[None]:
        """Runs the policy's forward passes with these weights. With `rest_on_cpu` they are on the policy's device only
        within this context."""
        moves = self.rest_on_cpu and hasattr(self, "model")
        if moves:
            move_weights(self.model, policy.device)
        try:
            with policy.weights_of(self):
                yield
        finally:
            if moves:
                move_weights(self.model, torch.device("cpu"))

    @torch.no_grad()
    def refresh(self, policy: Policy, ema_decay: float = 0.0) -> None:
        """weights <- ema_decay * weights + (1 - ema_decay) * policy."""
        followed = policy.model.named_parameters()
        if policy.lora is not None:
            followed = ((name, p) for name, p in followed if p.requires_grad)
        for ours, (_, theirs) in zip(self.parameters(), followed, strict=True):
            local(ours).lerp_(local(theirs).to(local(ours)), 1 - ema_decay)


class Reference(FrozenWeights):
    """The policy's initial weights, for the KL divergence to them (`model.reference_kl`).

    Args:
        rest_on_cpu: See `FrozenWeights`.
    """

    def __init__(self, rest_on_cpu: bool = False) -> None:
        super().__init__(rest_on_cpu, TeacherWeights(every_n_epochs=None))
