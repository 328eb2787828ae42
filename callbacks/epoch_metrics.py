"""Logs the metrics of each epoch."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, cast

from lightning import Callback, LightningModule, Trainer

from rlrt_lightning.runtime.ranks import Mean, gather, mean_over_ranks, rank, world_size

from .parts import data_of

if TYPE_CHECKING:
    from rlrt_lightning.module import RLRTModule

WeightedMeans = list[tuple[float, float]]
"""Pairs of a mean and the number of values it was taken over."""


class EpochMetrics(Callback):
    """Logs each epoch at its end: metrics of its rollouts, of its updates over all tokens of all ranks, and timings.

    The metrics are written to the loggers before the epoch is saved. A saved epoch is not trained again, so its metrics
    would be lost if the run were killed in between. A checkpoint within an epoch holds the metrics so far.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        """The metrics of the latest epoch over all ranks, by tag."""
        self._updates: dict[str, list[tuple[Any, float]]] = {}
        self._steps: dict[str, float] = {}
        self._tokens: Any = 0  # in the epoch's micro-batches; read at the end, because reading synchronizes a GPU
        self._padded_tokens = 0  # the same, including padding
        self._start = 0.0  # moved by the time of an evaluation within the epoch
        self._evaluation_start = 0.0
        self._resumed = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resets the metrics, unless the run was resumed within this epoch."""
        if self._resumed:
            self._resumed = False
            return
        self._updates, self._tokens, self._padded_tokens = {}, 0, 0
        self._steps = {"faults/skipped_steps": 0, "train/empty_steps": 0}
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collects the metrics of the micro-batch and of any optimizer step that it completed."""
        self._tokens = self._tokens + batch.tokens
        self._padded_tokens += batch.padded_tokens
        for tag, (mean, of) in outputs["metrics"].items():
            self._updates.setdefault(tag, []).append((mean, of))
        module = cast("RLRTModule", pl_module)
        steps, module.steps = module.steps, []
        for step in steps:
            self._updates.setdefault("train/grad_norm", []).append((step.gradient_norm, 1))
            self._updates.setdefault("train/lr", []).append((step.learning_rate, 1))
            self._steps["faults/skipped_steps"] += step.skipped
            self._steps["train/empty_steps"] += step.gradient_norm == 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock of the updates."""
        self._evaluation_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts it again."""
        self._start += time.perf_counter() - self._evaluation_start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the epoch."""
        data = data_of(trainer)
        metrics = {tag: _mean(parts) for tag, parts in self._updates.items()} | self._steps
        tokens, seconds = float(self._tokens), time.perf_counter() - self._start
        metrics["time/train"] = seconds
        metrics["speed/train_tokens_per_s"] = tokens / seconds
        metrics["speed/train_padding"] = Mean(1 - tokens / max(self._padded_tokens, 1), self._padded_tokens)
        values = self.latest = {**data.rollout_metrics, **mean_over_ranks(metrics)}
        pl_module.log_dict(values, logger=False, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        for logger in trainer.loggers:
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, trainer.global_step - 1)
            logger.save()
        self._updates = {}
        data.finish_epoch()

    def state_dict(self) -> dict[str, Any]:
        """The metrics of each rank so far, for a checkpoint within an epoch. All ranks must call it."""
        own = {
            "updates": {tag: [(float(mean), of) for mean, of in parts] for tag, parts in self._updates.items()},
            "steps": self._steps,
            "tokens": int(self._tokens),
            "places": self._padded_tokens,
            "seconds": time.perf_counter() - self._start,
        }
        return {"ranks": gather(own)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`. With a different number of ranks, they are ignored and the epoch starts over."""
        ranks = state_dict["ranks"]
        if len(ranks) != world_size() or not ranks[rank()]["updates"]:
            return
        own = ranks[rank()]
        self._updates, self._steps, self._tokens, self._padded_tokens = (
            own[name] for name in ("updates", "steps", "tokens", "places")
        )
        self._start = time.perf_counter() - own["seconds"]
        self._resumed = True


def _mean(parts: WeightedMeans) -> Mean:
    """The mean over all micro-batches with finite values. One non-finite value would make the epoch's mean NaN;
    `NumberGuard` writes such micro-batches to a file."""
    finite = [(float(mean), of) for mean, of in parts if of and math.isfinite(mean)]
    count = sum(of for _, of in finite)
    return Mean(sum(mean * of for mean, of in finite) / max(count, 1), count)
