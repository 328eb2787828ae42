"""Log-probs of an epoch's rollouts as tensors, and detection of non-finite values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlrt_lightning.policy.padding import pad_rows
from rlrt_lightning.rollouts import Rollout


def non_finite_log_probs(rollouts: Sequence[Rollout]) -> dict[int, str]:
    """The indices of rollouts with non-finite log-probs, with a description of each one's first non-finite value."""
    faults = {}
    for i, rollout in enumerate(rollouts):
        values = {
            "logp of the policy": rollout.logp_policy,
            "logp of the sampler": rollout.logp_sampler,
            "logp of the reference": rollout.logp_reference,
        }
        if wrong := first_non_finite(values):
            faults[i] = wrong
    return faults


def log_probs(rollouts: Sequence[Rollout], unusable: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Collects the log-probs of the response tokens as tensors.

    Args:
        rollouts: N rollouts.
        unusable: True for rollouts with non-finite log-probs, which are replaced by 0, bool [N].

    Returns:
        `logp_sampler` and `logp_old` (the policy's log-probs if the rollout was rescored, otherwise the sampler's),
        nats, [N, T] each, 0 after the response; and `rescored`, bool [N].
    """
    sampler = [r.logp_sampler for r in rollouts]
    old = [r.logp_sampler if r.logp_policy is None else r.logp_policy for r in rollouts]
    rescored = torch.tensor([r.logp_policy is not None for r in rollouts]) & ~unusable
    bad = unusable[:, None]
    # `masked_fill`, because 0 * NaN is NaN.
    return pad_rows(sampler).masked_fill(bad, 0.0), pad_rows(old).masked_fill(bad, 0.0), rescored


def reference_log_probs(rollouts: Sequence[Rollout], unusable: Tensor) -> Tensor:
    """The reference's log-probs of the response tokens, nats, [N, T]; 0 after the response, for rollouts that it has
    not scored, and for those that are unusable, bool [N]."""
    width = max(len(r.response_ids) for r in rollouts)
    return pad_rows([r.logp_reference for r in rollouts], width=width).masked_fill(unusable[:, None], 0.0)


def first_non_finite(values_by_name: Mapping[str, Tensor | None]) -> str | None:
    """Describes the first non-finite value in tensors [T, ...] of a response's tokens; None if all are finite."""
    for name, values in values_by_name.items():
        if values is not None and not values.isfinite().all():
            where = int((~values.isfinite()).nonzero()[0, 0])
            bad = values[~values.isfinite()][0]
            return f"{name} is {float(bad)} at token {where}"
    return None
