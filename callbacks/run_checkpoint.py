"""Checkpoints of which the last is the last epoch's, and a monitored score that of the saved weights."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rlrt_lightning.runtime.private.lightning import save_last
from rlrt_lightning.runtime.trainer_checks import check_logged


class RunCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, whose place it takes in every run (`SafeStop`), with three differences.

    - With `monitor`, Lightning writes last.ckpt only in epochs that are among the best. Here it is always the last
      epoch that was due (`every_n_epochs`), so that a run is resumed from where it was.
    - A score of an evaluation (`eval/...`) counts in the epoch in which it was measured. Lightning also gives it to the
      weights of later epochs, as long as there is no newer one.
    - After `trainer.fast_dev_run` there is no checkpoint; Lightning writes last.ckpt when training ends.
    """

    _measured = -1  # optimizer steps after which the newest evaluation was made

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes which weights were evaluated."""
        self._measured = -1 if trainer.sanity_checking else trainer.global_step
        super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the epoch.

        Raises:
            ConfigError: If what is monitored was not logged.
        """
        check_logged(self, list(trainer.callback_metrics))
        of_evaluation = self.monitor is not None and self.monitor.startswith("eval/")
        if not of_evaluation or self._measured == trainer.global_step:
            super().on_train_epoch_end(trainer, pl_module)
        due = self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due and not trainer.fast_dev_run and self.save_last:  # type: ignore[attr-defined]
            save_last(self, trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Has the last epoch saved, where no other was."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            super().on_train_end(trainer, pl_module)


def adopt(callbacks: list[Any]) -> None:
    """Gives every plain `ModelCheckpoint` the behaviour of `RunCheckpoint`: Lightning calls no other callback after it
    in an epoch, and users make their own as they are used to.

    Args:
        callbacks: The trainer's callbacks.
    """
    for callback in callbacks:
        if type(callback) is ModelCheckpoint:
            callback.__class__ = RunCheckpoint
