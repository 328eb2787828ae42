"""When the teacher takes the policy's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from lightning import Callback, LightningModule, Trainer

from rlrt_lightning.errors import ConfigError

if TYPE_CHECKING:
    from rlrt_lightning.module import RLRTModule


class TeacherRefresh(Callback):
    """Decides whose weights the teacher has.

    Refreshed each epoch (the default), the teacher is the policy that made the epoch's roll-outs: it scores them before
    the first update and needs no weights of its own. In every other case it keeps a copy, which checkpoints hold too.

    Args:
        every_n_epochs: Refresh after every so many epochs; null never does, so the teacher keeps the initial weights.
        ema_decay: At a refresh the teacher becomes ema_decay * teacher + (1 - ema_decay) * policy; 0 copies the policy.
    """

    def __init__(self, every_n_epochs: int | None = 1, ema_decay: float = 0.0) -> None:
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ConfigError(f"teacher_refresh.every_n_epochs is {every_n_epochs}; it has to be at least 1, or null")
        if not 0 <= ema_decay < 1:
            raise ConfigError(f"teacher_refresh.ema_decay is {ema_decay}; it has to be from 0 to below 1")
        if every_n_epochs is None and ema_decay > 0:
            raise ConfigError(
                f"teacher_refresh.ema_decay is {ema_decay}, but every_n_epochs is null, which never refreshes the "
                "teacher; set ema_decay to 0, or every_n_epochs to a number"
            )
        self.every_n_epochs = every_n_epochs
        self.ema_decay = ema_decay

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tells the teacher whether it needs a copy, before the weights are loaded."""
        module = cast("RLRTModule", pl_module)
        if self.every_n_epochs is None:
            module.teacher.weights = "initial"
        else:
            module.teacher.weights = "policy" if self.every_n_epochs == 1 and self.ema_decay == 0 else "own"

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refreshes the teacher before the next epoch's roll-outs are scored, and before this epoch is saved."""
        module = cast("RLRTModule", pl_module)
        due = self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if module.teacher.weights == "own" and due:
            module.teacher.refresh(module.policy, self.ema_decay)
