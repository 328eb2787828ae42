"""Metrics of an epoch's rollouts, logged by every run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rlrt_lightning.epoch.record import EpochRecord
from rlrt_lightning.objective.ratios import kl_estimate
from rlrt_lightning.policy.work import TokenCounter
from rlrt_lightning.rollouts import Rollout
from rlrt_lightning.runtime.ranks import Mean, sum_over_ranks


class Clock:
    """Measures the seconds of each phase of an epoch, excluding nested phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._nested = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Times a phase; repeated phases add up."""
        before, self._nested = self._nested, 0.0
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self.seconds[f"time/{phase}"] = self.seconds.get(f"time/{phase}", 0.0) + spent - self._nested
        self._nested = before + spent


def epoch_metrics(record: EpochRecord, clock: Clock, counter: TokenCounter, cap: float | None) -> dict[str, float]:
    """This rank's metrics of an epoch before its first update, by tag.

    Args:
        record: The epoch's record.
        clock: Seconds of the epoch's phases.
        counter: Tokens of the epoch's forward passes without gradients.
        cap: Upper bound of the importance weights; None without `data.rescore`.
    """
    metrics = {**record.drawn, **clock.seconds}
    metrics["faults/rollouts"] = float(sum_over_ranks(torch.tensor(float(len(record.faults)))))
    if cap is not None:
        compared = record.mask & record.rescored[:, None]
        difference = (record.logp_old - record.logp_sampler)[compared]
        metrics |= mismatch(difference, record.importance[compared] == cap)
    if counter.padded_tokens:
        scoring = ("rescore", "reference", "teacher")
        tokens, seconds = float(counter.tokens), sum(clock.seconds.get(f"time/{phase}", 0.0) for phase in scoring)
        metrics["speed/score_tokens_per_s"] = tokens / max(seconds, 1e-9)
        metrics["speed/score_padding"] = Mean(1 - tokens / counter.padded_tokens, counter.padded_tokens)
    metrics["rollout/shaped_reward"] = float(record.shaped_rewards.mean())
    metrics["signal/context_truncated"] = float(record.contexts_truncated)
    return metrics | record.gate_metrics


def mismatch(difference: Tensor, capped: Tensor) -> dict[str, float]:
    """Metrics of the mismatch between sampler and trainer.

    Args:
        difference: log P_trainer - log P_sampler of the sampled tokens, nats, [R].
        capped: Whether the importance weight was capped, [R].

    Returns:
        By tag; the KL is KL(sampler || trainer). Empty without tokens.
    """
    if not len(difference):
        return {}
    return {
        "rollout/mismatch_mean": Mean(float(difference.abs().mean()), len(difference)),
        "rollout/mismatch_max": float(difference.abs().max()),
        "rollout/mismatch_kl": Mean(float(kl_estimate(difference).mean()), len(difference)),
        "rollout/mismatch_capped": Mean(float(capped.float().mean()), len(difference)),
    }


def rollout_metrics(rollouts: Sequence[Rollout], rewards: Tensor, groups: Tensor) -> dict[str, float]:
    """Metrics of rewards, lengths, entropy and groups, by tag."""
    verdicts = [r.verdict for r in rollouts if r.verdict is not None]
    correct = torch.tensor([v.correct for v in verdicts]).float()
    size = torch.bincount(groups)
    solved = torch.zeros(len(size)).index_add_(0, groups, correct) / size
    lengths = torch.tensor([len(r.response_ids) for r in rollouts]).float()
    metrics: dict[str, Tensor | float] = {
        "rollout/reward": rewards.mean(),
        "rollout/correct": correct.mean(),
        "rollout/length": lengths.mean(),
        "rollout/truncated": torch.tensor([r.truncated for r in rollouts]).float().mean(),
        "rollout/faults": torch.tensor([v.fault for v in verdicts]).float().mean(),
        "groups/all_correct": (solved == 1).float().mean(),
        "groups/all_wrong": (solved == 0).float().mean(),
        "groups/mixed": ((solved > 0) & (solved < 1)).float().mean(),
    }
    # Engines such as vLLM return only log-probs. An entropy is the mean of -log P over tokens sampled from P, so that
    # those of the sampled tokens estimate it, for all rollouts and before the epoch's first update.
    entropies = torch.cat([-r.logp_sampler if r.entropy is None else r.entropy for r in rollouts])
    entropies = entropies[entropies.isfinite()]
    if len(entropies):
        metrics["rollout/entropy"] = Mean(float(entropies.mean()), len(entropies))
    for name in dict.fromkeys(name for v in verdicts for name in v.rewards):
        parts = [v.rewards[name] for v in verdicts if name in v.rewards]
        metrics[f"rewards/{name}"] = Mean(sum(parts) / len(parts), len(parts))
    labels = Counter(v.label for v in verdicts if v.label is not None)
    metrics |= {f"labels/{label}": torch.tensor(count / len(verdicts)) for label, count in labels.items()}
    return {tag: value if isinstance(value, Mean) else float(value) for tag, value in metrics.items()}
