"""The callbacks that every run has, whether started from the command line or from Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar

from .collapse_guard import CollapseGuard
from .dashboard import Dashboard
from .epoch_metrics import EpochMetrics
from .evaluation import Evaluation
from .memory_estimate import MemoryEstimate
from .number_guard import NumberGuard
from .phase_bar import PhaseBar
from .prompt_preview import PromptPreview
from .rank_guard import RankGuard
from .reversed_signal import ReversedSignalLogger
from .run_report import RunReport
from .safe_stop import SafeStop
from .teacher_evaluation import TeacherEvaluation
from .teacher_refresh import TeacherRefresh

WITH_SETTINGS: dict[str, type[Callback]] = {
    "teacher_refresh": TeacherRefresh,
    "reversed_signal": ReversedSignalLogger,
    "evaluation": Evaluation,
    "teacher_evaluation": TeacherEvaluation,
    "rank_guard": RankGuard,
    "number_guard": NumberGuard,
    "collapse_guard": CollapseGuard,
    "checkpoint": ModelCheckpoint,
}
"""Callbacks with settings, by their keys on the command line."""

CHECKPOINT: dict[str, Any] = {
    "filename": "epoch-{epoch}",
    "auto_insert_metric_name": False,
    "save_last": True,
    "save_on_train_epoch_end": True,
}
"""Our defaults for `ModelCheckpoint`. An epoch is saved at its end, after its validation."""


def default_callbacks(
    present: Sequence[Callback],
    checkpoints: bool,
    made: Mapping[str, Callback] | None = None,
    progress_bar: bool = False,
) -> list[Callback]:
    """The default callbacks that are not present yet, in the order in which they must run: a micro-batch's metrics are
    collected (`EpochMetrics`) before a run is saved (`SafeStop`), which in turn happens while the ranks still watch
    each other (`RankGuard`).

    Args:
        present: The trainer's callbacks. One of the same class, or of a subclass, replaces the default.
        checkpoints: Whether checkpoints are enabled.
        made: The callbacks of `WITH_SETTINGS` with the user's settings; None creates them with default settings.
        progress_bar: Whether to add `PhaseBar` if there is no progress bar yet.
    """
    if made is None:
        made = {name: kind(**(CHECKPOINT if name == "checkpoint" else {})) for name, kind in WITH_SETTINGS.items()}
    ours: list[Callback] = [EpochMetrics(), SafeStop(), Dashboard(), PromptPreview(), MemoryEstimate()]
    ours += [*made.values(), RunReport()]
    if progress_bar and not any(isinstance(callback, ProgressBar) for callback in present):
        ours.append(PhaseBar())
    wanted = (callback for callback in ours if checkpoints or not isinstance(callback, ModelCheckpoint))
    return [callback for callback in wanted if not any(isinstance(other, type(callback)) for other in present)]


def adopt_checkpoints(callbacks: Iterable[Callback]) -> None:
    """Applies our defaults to a `ModelCheckpoint` with Lightning's defaults, such as the one that the trainer creates.
    The object is modified in place, because user code may hold a reference to it."""
    untouched = vars(ModelCheckpoint())
    for callback in callbacks:
        if type(callback) is ModelCheckpoint and vars(callback) == untouched:
            ModelCheckpoint.__init__(callback, **CHECKPOINT)
