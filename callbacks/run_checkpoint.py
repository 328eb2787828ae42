"""Makes last.ckpt the last epoch's checkpoint, and a monitored score that of the saved weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rlrt_lightning.runtime.private.lightning import save_last
from rlrt_lightning.runtime.trainer_checks import check_logged


class RunCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, which it replaces in every run (`SafeStop`), with four differences.

    - With `monitor`, Lightning writes last.ckpt only in epochs that are among the best. Here it is always the last
      epoch that was due (`every_n_epochs`), so a run resumes from where it stopped.
    - An evaluation score (`eval/...`) is used only in the epoch in which it was measured. Lightning also assigns it to
      the weights of later epochs until there is a new one.
    - `trainer.fast_dev_run` writes no checkpoint; Lightning writes last.ckpt at the end of training.
    - A run whose folder was moved is resumed with the checkpoints there. Lightning forgets the best ones and leaves
      last.ckpt as it is.
    """

    _evaluated_step = -1  # global step of the latest evaluation

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replaces the folder in the state's paths if the checkpoints have been moved to this run's folder."""
        here, last = Path(str(self.dirpath)), str(state_dict.get("last_model_path") or "")
        if str(here) != state_dict.get("dirpath") and last and (here / Path(last).name).exists():
            state_dict = {name: _moved(value, here) for name, value in state_dict.items()} | {"dirpath": self.dirpath}
        super().load_state_dict(state_dict)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records which weights were evaluated."""
        self._evaluated_step = -1 if trainer.sanity_checking else trainer.global_step
        super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the epoch.

        Raises:
            ConfigError: If the monitored tag was not logged.
        """
        check_logged(self, list(trainer.callback_metrics))
        of_evaluation = self.monitor is not None and self.monitor.startswith("eval/")
        if not of_evaluation or self._evaluated_step == trainer.global_step:
            super().on_train_epoch_end(trainer, pl_module)
        due = self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due and not trainer.fast_dev_run and self.save_last:  # type: ignore[attr-defined]
            save_last(self, trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets Lightning save the last epoch if no epoch was saved."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            super().on_train_end(trainer, pl_module)


def _moved(value: Any, folder: Path) -> Any:
    """Checkpoint paths in a state, in another folder."""
    if isinstance(value, dict):
        return {_moved(key, folder): score for key, score in value.items()}
    return str(folder / Path(value).name) if isinstance(value, str) and value.endswith(".ckpt") else value


def adopt(callbacks: list[Any]) -> None:
    """Turns every plain `ModelCheckpoint` into a `RunCheckpoint`. A separate callback cannot do this, because Lightning
    runs checkpoint callbacks last, and users may create plain ones.

    Args:
        callbacks: The trainer's callbacks.
    """
    for callback in callbacks:
        if type(callback) is ModelCheckpoint:
            callback.__class__ = RunCheckpoint
