"""Log-probs of an epoch's rollouts as tensors, and which rollouts have non-finite ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlrt_lightning.policy.padding import pad_rows
from rlrt_lightning.rollouts import Rollout


def non_finite_log_probs(rollouts: Sequence[Rollout]) -> dict[int, str]:
    """The rollouts with a non-finite log-prob, by their position, with a description of the first one."""
    faults = {}
    for i, rollout in enumerate(rollouts):
        by = {"logp of the policy": rollout.logp_policy, "logp of the sampler": rollout.logp_sampler}
        if wrong := not_finite(by):
            faults[i] = wrong
    return faults


def log_probs(rollouts: Sequence[Rollout], unusable: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The log-probs of the response tokens as tensors.

    Args:
        rollouts: N rollouts.
        unusable: Rollouts with non-finite log-probs, which get 0 in place of them, bool [N].

    Returns:
        `logp_sampler`, `logp_old` (the policy's where the rollout was rescored, the sampler's elsewhere), nats, [N, T]
        each, 0 after the response; and which rollouts were rescored, bool [N].
    """
    sampler = [r.logp_sampler for r in rollouts]
    old = [r.logp_sampler if r.logp_policy is None else r.logp_policy for r in rollouts]
    rescored = torch.tensor([r.logp_policy is not None for r in rollouts]) & ~unusable
    bad = unusable[:, None]
    # Not a product: 0 times NaN is NaN.
    return pad_rows(sampler).masked_fill(bad, 0.0), pad_rows(old).masked_fill(bad, 0.0), rescored


def not_finite(values_by_name: Mapping[str, Tensor | None]) -> str | None:
    """What is not finite among some values of a response's tokens, [T, ...] each: the first, in words."""
    for name, values in values_by_name.items():
        if values is not None and not values.isfinite().all():
            where = int((~values.isfinite()).nonzero()[0, 0])
            bad = values[~values.isfinite()][0]
            return f"{name} is {float(bad)} at token {where}"
    return None
