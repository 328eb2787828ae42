"""What an epoch's roll-outs are like, in figures for the logs, and which of them have numbers that are none."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rlrt_lightning.objective.ratios import kl_estimate
from rlrt_lightning.padding import pad_rows
from rlrt_lightning.ranks import Mean
from rlrt_lightning.rollouts import Rollout


class Clock:
    """Seconds of each phase of an epoch, without those of the phases within it."""

    def __init__(self) -> None:
        self.stats: dict[str, float] = {}
        self._within = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Times a phase."""
        outside, self._within = self._within, 0.0
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.stats[f"time/{phase}"] = spent - self._within
        self._within = outside + spent


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


def not_finite(figures: Mapping[str, Tensor | None]) -> str | None:
    """What is not finite among some figures of a response's tokens, [T, ...] each: the first, in words."""
    for name, values in figures.items():
        if values is not None and not values.isfinite().all():
            where = int((~values.isfinite()).nonzero()[0, 0])
            bad = values[~values.isfinite()][0]
            return f"{name} is {float(bad)} at token {where}"
    return None


def mismatch(difference: Tensor, capped: Tensor) -> dict[str, float]:
    """How far the sampler is from the trainer, from log P_trainer - log P_sampler of the sampled tokens [R] and whether
    the importance weight was capped [R]; the KL is KL(sampler || trainer)."""
    if not len(difference):
        return {}
    return {
        "rollout/mismatch_mean": Mean(float(difference.abs().mean()), len(difference)),
        "rollout/mismatch_max": float(difference.abs().max()),
        "rollout/mismatch_kl": Mean(float(kl_estimate(difference).mean()), len(difference)),
        "rollout/mismatch_capped": Mean(float(capped.float().mean()), len(difference)),
    }


def statistics(rollouts: Sequence[Rollout], rewards: Tensor, groups: Tensor) -> dict[str, float]:
    """What every run logs of its roll-outs."""
    verdicts = [r.verdict for r in rollouts if r.verdict is not None]
    correct = torch.tensor([v.correct for v in verdicts]).float()
    size = torch.bincount(groups)
    solved = torch.zeros(len(size)).index_add_(0, groups, correct) / size
    lengths = torch.tensor([len(r.response_ids) for r in rollouts]).float()
    stats: dict[str, Tensor | float] = {
        "rollout/reward": rewards.mean(),
        "rollout/correct": correct.mean(),
        "rollout/length": lengths.mean(),
        "rollout/truncated": torch.tensor([r.truncated for r in rollouts]).float().mean(),
        "rollout/faults": torch.tensor([v.fault for v in verdicts]).float().mean(),
        "groups/all_correct": (solved == 1).float().mean(),
        "groups/all_wrong": (solved == 0).float().mean(),
        "groups/mixed": ((solved > 0) & (solved < 1)).float().mean(),
    }
    if all(r.entropy is not None for r in rollouts):
        of_tokens = torch.cat([r.entropy for r in rollouts if r.entropy is not None])
        of_tokens = of_tokens[of_tokens.isfinite()]
        if len(of_tokens):
            stats["rollout/entropy"] = Mean(float(of_tokens.mean()), len(of_tokens))
    labels = Counter(v.label for v in verdicts if v.label is not None)
    stats |= {f"labels/{label}": torch.tensor(count / len(verdicts)) for label, count in labels.items()}
    return {tag: value if isinstance(value, Mean) else float(value) for tag, value in stats.items()}
