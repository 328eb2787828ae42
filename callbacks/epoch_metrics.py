"""What every run logs at the end of each epoch."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, cast

from lightning import Callback, LightningModule, Trainer

from rlrt_lightning.runtime.ranks import Mean, gather, mean_over_ranks, rank, world_size

if TYPE_CHECKING:
    from rlrt_lightning.datamodule import RolloutDataModule
    from rlrt_lightning.module import RLRTModule

Parts = list[tuple[float, float]]
"""Means, and how many values each is the mean of."""


class EpochMetrics(Callback):
    """Logs an epoch at its end: what its rollouts were like, what its updates were like over all tokens of all ranks,
    and how long both took.

    It writes to the loggers at once, before the epoch is saved: an epoch that is saved is not trained again, so its
    metrics would be missing if the run were killed in between. A checkpoint in the middle of an epoch holds what is
    known so far.
    """

    def __init__(self) -> None:
        self._updates: dict[str, list[tuple[Any, float]]] = {}
        self._steps: dict[str, float] = {}
        self._tokens: Any = 0  # of the epoch's micro-batches; read at the epoch's end: a GPU would stop for it
        self._places = 0  # of these, padding included
        self._start = 0.0
        self._resumed = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins anew, unless the epoch was resumed in its middle."""
        if self._resumed:
            self._resumed = False
            return
        self._updates, self._tokens, self._places = {}, 0, 0
        self._steps = {"faults/skipped_steps": 0, "train/empty_steps": 0}
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collects what the micro-batch and, where it was the last of one, the optimizer step say."""
        self._tokens = self._tokens + batch.tokens
        self._places += batch.padded_tokens
        for tag, (mean, of) in outputs["metrics"].items():
            self._updates.setdefault(tag, []).append((mean, of))
        module = cast("RLRTModule", pl_module)
        steps, module.steps = module.steps, []
        for step in steps:
            self._updates.setdefault("train/grad_norm", []).append((step.gradient_norm, 1))
            self._updates.setdefault("train/lr", []).append((step.learning_rate, 1))
            self._steps["faults/skipped_steps"] += step.skipped
            self._steps["train/empty_steps"] += step.gradient_norm == 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the epoch."""
        data: RolloutDataModule = trainer.datamodule  # type: ignore[attr-defined]
        metrics = {tag: _mean(parts) for tag, parts in self._updates.items()} | self._steps
        tokens, seconds = float(self._tokens), time.perf_counter() - self._start
        metrics["time/train"] = seconds
        metrics["speed/train_tokens_per_s"] = tokens / seconds
        metrics["speed/train_padding"] = Mean(1 - tokens / max(self._places, 1), self._places)
        values = {**data.rollout_metrics, **mean_over_ranks(metrics)}
        pl_module.log_dict(values, logger=False, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        for logger in trainer.loggers:
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, trainer.global_step - 1)
            logger.save()
        self._updates = {}
        data.finish_epoch()

    def state_dict(self) -> dict[str, Any]:
        """What each rank knows of the epoch so far, for a checkpoint in its middle. All ranks have to ask."""
        own = {
            "updates": {tag: [(float(mean), of) for mean, of in parts] for tag, parts in self._updates.items()},
            "steps": self._steps,
            "tokens": int(self._tokens),
            "places": self._places,
            "seconds": time.perf_counter() - self._start,
        }
        return {"ranks": gather(own)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`. With other ranks than before there is nothing to go on with: the epoch begins anew."""
        ranks = state_dict["ranks"]
        if len(ranks) != world_size() or not ranks[rank()]["updates"]:
            return
        own = ranks[rank()]
        self._updates, self._steps, self._tokens, self._places = (
            own[name] for name in ("updates", "steps", "tokens", "places")
        )
        self._start = time.perf_counter() - own["seconds"]
        self._resumed = True


def _mean(parts: Parts) -> Mean:
    """The mean over all micro-batches. One that is not finite would make a whole epoch's curve NaN; what was bad in it
    stands in a file of its own (`NumberGuard`)."""
    finite = [(float(mean), of) for mean, of in parts if of and math.isfinite(mean)]
    count = sum(of for _, of in finite)
    return Mean(sum(mean * of for mean, of in finite) / max(count, 1), count)
