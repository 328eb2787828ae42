"""What happens to numbers that are not finite."""

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

if TYPE_CHECKING:
    from rlrt_lightning.datamodule import RolloutDataModule
    from rlrt_lightning.epoch.batch import MicroBatch
    from rlrt_lightning.module import RLRTModule
    from rlrt_lightning.rollouts import Rollout

log = logging.getLogger(__name__)

MOST_ROWS = 100
"""Rollouts in one file."""

MOST_FILES = 100
"""Files in the folder: a run that goes on for long with bad numbers does not fill the disk."""

Row = dict[str, Any]


class NumberGuard(Callback):
    """Writes down the rollouts with which NaN or infinity came up, and ends a run that does not get away from it.

    An optimizer step whose gradient is not finite is skipped: weights and optimizer stay as they are, the learning
    rate's schedule goes on. The rollouts of its micro-batches go to `bad_numbers/step-N.jsonl` in the run's folder,
    those whose loss is not finite first. Rollouts with log-probs that are not finite take no part in the update and go
    to `bad_numbers/epoch-N.jsonl`. `faults/skipped_steps` and `faults/rollouts` count both. Under
    `--trainer.precision=16-mixed` the gradient scaler skips steps by itself, which count once its scale cannot fall.

    No checkpoint is written of weights that are not finite.

    Args:
        patience: After so many skipped steps in a row the run ends.
    """

    def __init__(self, patience: int = 3) -> None:
        if patience < 1:
            raise ConfigError(f"number_guard.patience is {patience}; it has to be at least 1")
        self.patience = patience
        self._in_a_row = 0
        self._losses: list[Any] = []  # of the micro-batches since the last optimizer step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that no other run's files are in the way."""
        if stage == "fit":
            claim_path(trainer, "bad_numbers")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the epoch's rollouts that have bad log-probs.

        Raises:
            ConfigError: On all ranks, if there are no others.
        """
        self._losses = []
        epoch, count = _data(trainer).epoch, _data(trainer).rollout_metrics.get("faults/rollouts")  # over all ranks
        if epoch is None or not count:
            return
        module = cast("RLRTModule", pl_module)
        rows = []
        for i, what in list(epoch.faults.items())[:MOST_ROWS]:
            rollout = epoch.rollouts[i]
            row = _row(module, what, rollout.prompt_ids, rollout.response_ids)
            rows.append({**row, **_of_rollout(trainer, rollout, float(epoch.advantages[i]))})
        path = self._write(trainer, f"epoch-{trainer.current_epoch}", rows)
        if trainer.is_global_zero:
            log.warning("%d rollouts of epoch %d have bad log-probs: %s", int(count), trainer.current_epoch, path)
        if count >= trainer.world_size * len(epoch.rollouts):
            raise ConfigError(
                f"all rollouts of epoch {trainer.current_epoch} have log-probs that are not finite: look at {path}; "
                "the model's weights or the sampler (data.engine) are broken, so go on from an earlier checkpoint"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts skipped steps.

        Raises:
            ConfigError: On all ranks, after too many in a row.
        """
        self._losses.append(outputs["loss"])
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        losses, self._losses = self._losses, []
        module, step = cast("RLRTModule", pl_module), trainer.global_step
        if not module.skipped:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        batches = _data(trainer).newest_batches(len(losses))
        rows = list(self._rows(trainer, module, batches, list(map(float, losses))))
        rows.sort(key=lambda row: math.isfinite(row["loss"]))
        path = self._write(trainer, f"step-{step}", rows[:MOST_ROWS])
        if self._in_a_row < self.patience:
            if trainer.is_global_zero:
                log.warning("skipped optimizer step %d, whose gradient is not finite; its rollouts: %s", step, path)
            return
        raise ConfigError(
            f"{self._in_a_row} optimizer steps in a row, up to step {step}, had a gradient that is not finite "
            f"(number_guard.patience is {self.patience}), and were skipped; look at {path}, lower the learning rate "
            "(model.optimizer.lr) or set trainer.precision to bf16-mixed or 32-true, and go on with --ckpt_path last "
            "or an earlier checkpoint"
        )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Looks at the weights before they are saved.

        Raises:
            ConfigError: On all ranks, if any is not finite.
        """
        weights = (local(p) for p in cast("RLRTModule", pl_module).policy.parameters() if p.requires_grad)
        bad = not bool(torch.stack([torch.isfinite(w).all() for w in weights]).all())
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        if bad:
            raise ConfigError(
                f"after optimizer step {trainer.global_step} the policy has weights that are not finite, which are not "
                "saved; lower the learning rate (model.optimizer.lr) or set trainer.precision to bf16-mixed or "
                "32-true, and go on with --ckpt_path last"
            )

    def state_dict(self) -> dict[str, Any]:
        """The skipped steps in a row."""
        return {"in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._in_a_row = state_dict["in_a_row"]

    def _rows(
        self, trainer: Trainer, module: RLRTModule, batches: list[MicroBatch], losses: list[float]
    ) -> Iterable[Row]:
        epoch = _data(trainer).epoch  # None where the run was resumed in the middle of it
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
                    row |= _of_rollout(trainer, epoch.rollouts[i], float(epoch.advantages[i]))
                yield row

    def _write(self, trainer: Trainer, name: str, rows: list[Row]) -> Path:
        """Writes what all ranks have; all have to call."""
        folder = claim_path(trainer, "bad_numbers")
        path = folder / f"{name}.jsonl"
        every = [row for of_rank in gather(rows) for row in of_rank]
        if trainer.is_global_zero:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if len(list(folder.glob("*.jsonl"))) < MOST_FILES:
                    lines = [json.dumps({k: _plain(v) for k, v in row.items()}) for row in every[:MOST_ROWS]]
                    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            except OSError as error:
                log.warning("%s cannot be written: %s", path, error.strerror)
        trainer.strategy.barrier()  # what is raised next is raised on all ranks at the same time
        return path


def _data(trainer: Trainer) -> RolloutDataModule:
    return cast("RolloutDataModule", cast(Any, trainer).datamodule)


def _row(module: RLRTModule, what: str, prompt_ids: list[int], response_ids: list[int]) -> Row:
    return {
        "bad": what,
        "prompt": module.policy.tokenizer.decode(prompt_ids),
        "response": module.policy.decode(response_ids),
        "prompt_ids": prompt_ids,
        "response_ids": response_ids,
    }


def _of_rollout(trainer: Trainer, rollout: Rollout, advantage: float) -> Row:
    epoch = _data(trainer).epoch
    assert epoch is not None
    reward = rollout.verdict.reward if rollout.verdict is not None else None
    return {"problem": epoch.problems[rollout.group].id, "reward": reward, "advantage": advantage}


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
