"""Handles non-finite losses, gradients, log-probs and weights."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import Callback, LightningModule, Trainer

from rlrt_lightning.policy.sharding import local
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.ranks import gather
from rlrt_lightning.runtime.run_files import claim_path

from .parts import data_of

if TYPE_CHECKING:
    from rlrt_lightning.epoch.batch import MicroBatch
    from rlrt_lightning.module import RLRTModule
    from rlrt_lightning.rollouts import Rollout

log = logging.getLogger(__name__)

MAX_ROWS = 100
"""Maximum number of rollouts in one file."""

MAX_FILES = 100
"""Maximum number of files, so a long run with many non-finite values does not fill the disk."""

Row = dict[str, Any]


class NumberGuard(Callback):
    """Records the rollouts that led to NaN or infinity, and ends a run that does not recover.

    An optimizer step with a non-finite gradient is skipped: weights and optimizer state do not change, the learning
    rate schedule advances. The rollouts of its micro-batches are written to `bad_numbers/step-N.jsonl` in the run's
    folder, those with a non-finite loss first. Rollouts with non-finite log-probs are excluded from the update and
    written to `bad_numbers/epoch-N.jsonl`, with epochs counted from 1. `faults/skipped_steps` and `faults/rollouts`
    count them. Under `--trainer.precision=16-mixed` the gradient scaler skips steps itself; these count once its scale
    cannot fall.

    Non-finite weights are never saved.

    Args:
        patience: Number of consecutive skipped steps after which the run ends.
    """

    def __init__(self, patience: int = 3) -> None:
        if patience < 1:
            raise ConfigError(f"number_guard.patience is {patience}; it has to be at least 1")
        self.patience = patience
        self._consecutive = 0
        self._losses: list[Any] = []  # of the micro-batches since the last optimizer step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that no other run's files would be overwritten."""
        if stage == "fit":
            claim_path(trainer, "bad_numbers")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the epoch's rollouts with non-finite log-probs.

        Raises:
            ConfigError: On all ranks, if every rollout has them.
        """
        self._losses = []
        epoch, count = data_of(trainer).epoch, data_of(trainer).rollout_metrics.get("faults/rollouts")  # over all ranks
        if epoch is None or not count:
            return
        module = cast("RLRTModule", pl_module)
        rows = []
        for i, what in list(epoch.faults.items())[:MAX_ROWS]:
            rollout = epoch.rollouts[i]
            row = _row(module, what, rollout.prompt_ids, rollout.response_ids)
            rows.append({**row, **_rollout_fields(trainer, rollout, float(epoch.advantages[i]))})
        number = trainer.current_epoch + 1
        path = self._write(trainer, f"epoch-{number}", rows)
        if trainer.is_global_zero:
            log.warning("%d rollouts of epoch %d have non-finite log-probs: %s", count, number, path)
        if count >= trainer.world_size * len(epoch.rollouts):
            raise ConfigError(
                f"all rollouts of epoch {number} have non-finite log-probs; see {path}. The model's "
                "weights or the engine (data.engine) are broken: resume from an earlier checkpoint"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts skipped steps.

        Raises:
            ConfigError: On all ranks, after `patience` consecutive ones.
        """
        self._losses.append(outputs["loss"])
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        losses, self._losses = self._losses, []
        module, step = cast("RLRTModule", pl_module), trainer.global_step
        if not module.skipped:
            self._consecutive = 0
            return
        self._consecutive += 1
        batches = data_of(trainer).newest_batches(len(losses))
        rows = list(self._rows(trainer, module, batches, list(map(float, losses))))
        rows.sort(key=lambda row: math.isfinite(row["loss"]))
        path = self._write(trainer, f"step-{step}", rows[:MAX_ROWS])
        if self._consecutive < self.patience:
            if trainer.is_global_zero:
                log.warning("skipped optimizer step %d, whose gradient is non-finite; its rollouts: %s", step, path)
            return
        raise ConfigError(
            f"skipped {self._consecutive} consecutive optimizer steps, up to step {step}, with a non-finite gradient "
            f"(number_guard.patience is {self.patience}); see {path}, lower the learning rate (model.optimizer.lr) or "
            "set trainer.precision to bf16-mixed or 32-true, and resume with --ckpt_path last or an earlier checkpoint"
        )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Checks the weights before they are saved.

        Raises:
            ConfigError: On all ranks, if any weight is not finite.
        """
        weights = (local(p) for p in cast("RLRTModule", pl_module).policy.parameters() if p.requires_grad)
        bad = not bool(torch.stack([torch.isfinite(w).all() for w in weights]).all())
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        if bad:
            raise ConfigError(
                f"the policy has non-finite weights after optimizer step {trainer.global_step}, so they are not saved; "
                "lower the learning rate (model.optimizer.lr) or set trainer.precision to bf16-mixed or 32-true, and "
                "resume with --ckpt_path last"
            )

    def state_dict(self) -> dict[str, Any]:
        """The number of consecutive skipped steps."""
        return {"in_a_row": self._consecutive}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._consecutive = state_dict["in_a_row"]

    def _rows(
        self, trainer: Trainer, module: RLRTModule, batches: list[MicroBatch], losses: list[float]
    ) -> Iterable[Row]:
        epoch = data_of(trainer).epoch  # None if the run was resumed within the epoch
        for number, (batch, loss) in enumerate(zip(batches, losses, strict=True)):
            what = "gradient" if math.isfinite(loss) else f"loss is {loss}"
            for i, ids, attention, response, logp, advantages, weights in zip(
                batch.rows,
                batch.input_ids,
                batch.attention_mask.bool(),
                batch.response_mask,
                batch.logp_old,
                batch.advantages,
                batch.importance,
                strict=True,
            ):
                row = {
                    **_row(module, what, ids[attention & ~response].tolist(), ids[response].tolist()),
                    "micro_batch": number,
                    "loss": loss,
                    "logp_old_max_abs": float(logp.abs().max()),
                    "token_advantage_max_abs": float(advantages.abs().max()),
                    "importance_max": float(weights.max()),
                }
                if epoch is not None:
                    row |= _rollout_fields(trainer, epoch.rollouts[i], float(epoch.advantages[i]))
                yield row

    def _write(self, trainer: Trainer, name: str, rows: list[Row]) -> Path:
        """Writes the rows of all ranks to one file. All ranks must call it."""
        folder = claim_path(trainer, "bad_numbers")
        path = folder / f"{name}.jsonl"
        gathered = [row for of_rank in gather(rows) for row in of_rank]
        if trainer.is_global_zero:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if len(list(folder.glob("*.jsonl"))) < MAX_FILES:
                    lines = [json.dumps({k: _json_value(v) for k, v in row.items()}) for row in gathered[:MAX_ROWS]]
                    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            except OSError as error:
                log.warning("%s cannot be written: %s", path, error.strerror)
        trainer.strategy.barrier()  # so that the caller raises on all ranks at the same time
        return path


def _row(module: RLRTModule, what: str, prompt_ids: list[int], response_ids: list[int]) -> Row:
    return {
        "bad": what,
        "prompt": module.policy.tokenizer.decode(prompt_ids),
        "response": module.policy.decode(response_ids),
        "prompt_ids": prompt_ids,
        "response_ids": response_ids,
    }


def _rollout_fields(trainer: Trainer, rollout: Rollout, advantage: float) -> Row:
    epoch = data_of(trainer).epoch
    assert epoch is not None
    reward = rollout.verdict.reward if rollout.verdict is not None else None
    return {"problem": epoch.problems[rollout.group].id, "reward": reward, "advantage": advantage}


def _json_value(value: Any) -> Any:
    """Converts non-finite numbers to strings, because JSON cannot represent them."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
