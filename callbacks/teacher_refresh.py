"""Whose weights the teacher has, and when it is refreshed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

from lightning import Callback, LightningModule, Trainer

from rlrt_lightning.objective import TeacherWeights
from rlrt_lightning.runtime.errors import ConfigError

if TYPE_CHECKING:
    from rlrt_lightning.module import RLRTModule


class TeacherRefresh(Callback):
    """Decides whose weights the teacher has: those that the method declares (`Needs.teacher`), unless one of these
    settings is given.

    Refreshed after every epoch without a moving average, the teacher is the policy that drew the epoch's rollouts: it
    scores them before the first update and needs no weights of its own. In every other case it keeps a copy, which
    checkpoints hold too.

    Args:
        every_n_epochs: Refresh after every so many epochs; null never does, so the teacher keeps the initial weights.
            "method" leaves it to the method, or is 1 where only ema_decay is given.
        ema_decay: At a refresh the teacher becomes ema_decay * teacher + (1 - ema_decay) * policy; 0 copies the policy.
            Null leaves it to the method, or is 0 where only every_n_epochs is given.
    """

    def __init__(
        self, every_n_epochs: int | Literal["method"] | None = "method", ema_decay: float | None = None
    ) -> None:
        self.chosen: TeacherWeights | None = None
        """What the settings say; None leaves it to the method."""
        if every_n_epochs == "method" and ema_decay is None:
            return
        try:
            self.chosen = TeacherWeights(1 if every_n_epochs == "method" else every_n_epochs, ema_decay or 0.0)
        except ValueError as error:
            raise ConfigError(f"teacher_refresh.{error}") from None

    def schedule(self, module: RLRTModule) -> TeacherWeights:
        """Whose weights the teacher of a module has: what the settings say, or else what its method declares."""
        return self.chosen or module.method.needs.teacher

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tells the teacher whether it needs a copy, before the weights are loaded.

        Raises:
            ConfigError: If the engine scores for a teacher whose weights it does not have.
        """
        module = cast("RLRTModule", pl_module)
        schedule = module.teacher.schedule = self.schedule(module)
        if stage == "fit" and module.teacher.scored_by == "engine" and schedule.kind != "policy":
            raise ConfigError(
                f"model.teacher.scored_by is engine, which has the policy's weights, but the teacher has {schedule}: "
                "set teacher_refresh.every_n_epochs=1, or model.teacher.scored_by=trainer"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refreshes the teacher before the next epoch's rollouts are scored, and before this epoch is saved."""
        module = cast("RLRTModule", pl_module)
        schedule = module.teacher.schedule
        if schedule.kind == "own" and schedule.due(trainer.current_epoch):
            module.teacher.refresh(module.policy, schedule.ema_decay)
