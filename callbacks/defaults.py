"""The callbacks that every run has, whether it is started from the command line or from Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from .collapse_guard import CollapseGuard
from .epoch_metrics import EpochMetrics
from .evaluation import Evaluation
from .number_guard import NumberGuard
from .prompt_preview import PromptPreview
from .rank_guard import RankGuard
from .reversed_signal import ReversedSignalLogger
from .safe_stop import SafeStop
from .teacher_refresh import TeacherRefresh

WITH_SETTINGS: dict[str, type[Callback]] = {
    "teacher_refresh": TeacherRefresh,
    "reversed_signal": ReversedSignalLogger,
    "evaluation": Evaluation,
    "rank_guard": RankGuard,
    "number_guard": NumberGuard,
    "collapse_guard": CollapseGuard,
    "checkpoint": ModelCheckpoint,
}
"""By the names of their settings on the command line."""

CHECKPOINT: dict[str, Any] = {
    "filename": "epoch-{epoch}",
    "auto_insert_metric_name": False,
    "save_last": True,
    "save_on_train_epoch_end": True,
}
"""Our defaults of the `ModelCheckpoint` callback: all of an epoch is saved at its end, before it is validated."""


def default_callbacks(
    present: Sequence[Callback], checkpoints: bool, made: Mapping[str, Callback] | None = None
) -> list[Callback]:
    """Those that are not there yet, in the order in which they have to run: a micro-batch has its metrics
    (`EpochMetrics`) before a run is saved (`SafeStop`), and that happens while its ranks still watch each other
    (`RankGuard`).

    Args:
        present: The trainer's callbacks; one of the same class, or of a subclass, takes the place of ours.
        checkpoints: Whether checkpoints are turned on.
        made: Ours with the user's settings, by `WITH_SETTINGS`; None: with their defaults.
    """
    if made is None:
        made = {name: kind(**(CHECKPOINT if name == "checkpoint" else {})) for name, kind in WITH_SETTINGS.items()}
    ours: list[Callback] = [EpochMetrics(), SafeStop(), PromptPreview(), *made.values()]
    wanted = (callback for callback in ours if checkpoints or not isinstance(callback, ModelCheckpoint))
    return [callback for callback in wanted if not any(isinstance(other, type(callback)) for other in present)]


def adopt_checkpoints(callbacks: Iterable[Callback]) -> None:
    """Gives our settings to a `ModelCheckpoint` that has none, which is what Lightning's trainer makes by itself. It
    stays the same object, as somebody may have asked the trainer for it already."""
    untouched = vars(ModelCheckpoint())
    for callback in callbacks:
        if type(callback) is ModelCheckpoint and vars(callback) == untouched:
            ModelCheckpoint.__init__(callback, **CHECKPOINT)
