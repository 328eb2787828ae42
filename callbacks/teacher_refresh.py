"""Decides which weights the teacher uses and when they are refreshed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

from lightning import Callback, LightningModule, Trainer

from rlrt_lightning.objective import TeacherWeights
from rlrt_lightning.runtime.errors import ConfigError

if TYPE_CHECKING:
    from rlrt_lightning.module import RLRTModule


class TeacherRefresh(Callback):
    """Decides which weights the teacher uses. The method declares them (`Needs.teacher`); the settings override that.

    A teacher that is refreshed after every epoch without a moving average equals the policy that drew the epoch's
    rollouts. It scores them before the first update and needs no separate weights. In all other cases the teacher has
    its own copy, which checkpoints include.

    Args:
        every_n_epochs: Interval between refreshes in epochs. Null never refreshes, so the teacher keeps the initial
            weights. "method" uses the method's value, or 1 if only ema_decay is set.
        ema_decay: A refresh sets the teacher to ema_decay * teacher + (1 - ema_decay) * policy; 0 copies the policy.
            Null uses the method's value, or 0 if only every_n_epochs is set.
    """

    def __init__(
        self, every_n_epochs: int | Literal["method"] | None = "method", ema_decay: float | None = None
    ) -> None:
        self.chosen: TeacherWeights | None = None
        """The schedule given by the settings; None uses the method's."""
        if every_n_epochs == "method" and ema_decay is None:
            return
        try:
            self.chosen = TeacherWeights(1 if every_n_epochs == "method" else every_n_epochs, ema_decay or 0.0)
        except ValueError as error:
            raise ConfigError(f"teacher_refresh.{error}") from None

    def schedule(self, module: RLRTModule) -> TeacherWeights:
        """The teacher's schedule: that of the settings, or else the one declared by the module's method."""
        return self.chosen or module.method.needs.teacher

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets the teacher's schedule before the weights are loaded; it determines whether the teacher needs a copy.

        Raises:
            ConfigError: If the engine is to score for a teacher with weights other than the policy's.
        """
        module = cast("RLRTModule", pl_module)
        schedule = module.teacher.schedule = self.schedule(module)
        if stage == "fit":
            check_scored_by(module, schedule)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refreshes the teacher before the next epoch's rollouts are scored, and before this epoch is saved."""
        module = cast("RLRTModule", pl_module)
        schedule = module.teacher.schedule
        if schedule.kind == "own" and schedule.due(trainer.current_epoch):
            module.teacher.refresh(module.policy, schedule.ema_decay)


def check_scored_by(module: RLRTModule, schedule: TeacherWeights) -> None:
    """Checks that what scores for the teacher has its weights.

    Args:
        module: The module.
        schedule: The teacher's schedule.

    Raises:
        ConfigError: If the engine is to score for a teacher with weights other than the policy's.
    """
    if module.teacher.scored_by == "engine" and schedule.kind != "policy":
        raise ConfigError(
            f"model.teacher.scored_by is engine, which has the policy's weights, but the teacher has {schedule}; "
            "set teacher_refresh.every_n_epochs=1 or model.teacher.scored_by=trainer"
        )
