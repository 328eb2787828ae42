"""Prints the story of a run: a line for each epoch, a table for each evaluation, and what to do next."""

from __future__ import annotations

import math
import shlex
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from rlrt_lightning.runtime.run_files import run_folder
from rlrt_lightning.runtime.terminal import say

from .epoch_metrics import EpochMetrics
from .evaluation import Evaluation
from .parts import callbacks_of
from .phase_bar import epoch_of
from .teacher_evaluation import TeacherEvaluation

Scores = dict[str, dict[str, float]]
"""Metrics by evaluation set and tag."""

COLUMNS = {
    "reward": ("rollout/reward", ".2f"),
    "correct": ("rollout/correct", ".2f"),
    "length": ("rollout/length", ".1f"),
    "entropy": ("rollout/entropy", ".2f"),
    "mixed": ("groups/mixed", ".2f"),
}
"""The metrics in an epoch's line, with their formats."""


class RunReport(Callback):
    """Prints the run's progress and results as lines, the same in a terminal and in a log file.

    One line for each epoch, with the mean reward, the share of correct rollouts, the mean length in tokens, the mean
    entropy in nats, the share of prompts with both correct and wrong rollouts, and the seconds; one row for each
    evaluation set, with the 95 % confidence interval of avg@k; the table of `TeacherEvaluation`, if it is enabled; and
    at the end what has changed, where the files are, and the next commands. `validate`, `test` and `predict` print one
    table instead of Lightning's.
    """

    def __init__(self) -> None:
        self._first: Scores = {}  # of the first evaluation of the run, and of the latest
        self._last: Scores = {}
        self._rewards: list[float] = []  # of the first and the latest epoch
        self._pending: list[str] = []  # rows of an evaluation, printed after its epoch's line
        self._trained = self._table = False

    # -- training --------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints where the files are written."""
        self._trained = False
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            say(f"run folder: {folder}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the epoch, and then its evaluation if there was one."""
        self._trained = True
        every = callbacks_of(trainer, EpochMetrics)
        metrics = every[0].latest if every else {}
        self._rewards = [*self._rewards[:1], metrics.get("rollout/reward", math.nan)]
        rows, self._pending = self._pending, []
        if trainer.is_global_zero:
            say("\n".join([epoch_line(trainer, metrics), *rows]))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints what has changed, where the files are, and what to do next."""
        folder = run_folder(trainer)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self._trained:
            say(f"no epoch was left to train: trainer.max_epochs is {trainer.max_epochs}")
            return
        lines = [f"{name:<11} {text}" for name, text in self._summary(trainer, folder)]
        say("\n".join(["", *self._changes(), "", *lines]))

    def _changes(self) -> list[str]:
        """The scores of the first and the latest evaluation, or the reward of the first and the latest epoch."""
        if self._first and self._first is not self._last:
            both = [(name, self._first.get(name, {}), last) for name, last in self._last.items()]
            rows = _aligned([[name, *_changed(first, last)] for name, first, last in both])
            return ["from the first evaluation to the last", *rows]
        return [f"reward {self._rewards[0]:.3f} -> {self._rewards[-1]:.3f}"]

    def _summary(self, trainer: Trainer, folder: Path) -> list[tuple[str, str]]:
        saved = (c.last_model_path or c.best_model_path for c in callbacks_of(trainer, ModelCheckpoint))
        checkpoint = next(filter(None, saved), None)
        lines = [("run folder", str(folder))]
        if checkpoint is not None:
            lines.append(("checkpoint", _short(checkpoint)))
        commands = [
            f"tensorboard --logdir {shlex.quote(str(logger.save_dir))}"
            for logger in trainer.loggers
            if isinstance(logger, TensorBoardLogger)
        ]
        config = folder / "config.yaml"
        if checkpoint is not None and config.exists():
            config_ = shlex.quote(str(config))
            commands.append(f"python -m rlrt_lightning validate --config {config_} --ckpt_path last")
        return lines + [("next" if not i else "", command) for i, command in enumerate(commands)]

    # -- evaluation ------------------------------------------------------------------------------------------------

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replaces Lightning's table, unless `verbose` is false."""
        fn = trainer.state.fn
        loop = trainer.validate_loop if fn == "validate" else trainer.test_loop if fn == "test" else None
        self._table = fn == "predict" or (loop is not None and loop.verbose)
        if loop is not None:
            loop.verbose = False

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the evaluation. Within `fit`, the epoch's line comes first."""
        found = callbacks_of(trainer, Evaluation)
        if not found or not found[0].scores:
            return
        evaluation = found[0]
        rows, fit = table(evaluation.scores), trainer.state.fn == "fit"
        rows += [line for of_teacher in callbacks_of(trainer, TeacherEvaluation) for line in of_teacher.lines]
        if fit:
            self._first, self._last = self._first or evaluation.scores, evaluation.scores
        if fit and not trainer.sanity_checking:
            self._pending = rows
        elif trainer.is_global_zero and (fit or self._table):
            say("\n".join(["before training", *rows] if fit else [*rows, f"files: {evaluation.folder}"]))

    on_validation_start = on_test_start = on_predict_start = _start
    on_validation_end = on_test_end = on_predict_end = _report

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The first scores, so that a resumed run compares with the beginning."""
        return {"first": self._first, "rewards": self._rewards[:1]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._first, self._rewards = state_dict["first"], state_dict["rewards"]


def epoch_line(trainer: Trainer, metrics: dict[str, float]) -> str:
    """The line of an epoch.

    Args:
        trainer: The trainer.
        metrics: The epoch's metrics by tag.
    """
    width = len(f"epoch {trainer.max_epochs}/{trainer.max_epochs}")
    values = [f"{name} {metrics[tag]:{form}}" for name, (tag, form) in COLUMNS.items() if tag in metrics]
    seconds = sum(value for tag, value in metrics.items() if tag.startswith("time/"))
    return "  ".join([epoch_of(trainer).ljust(width), *values, f"{seconds:.1f} s"])


def table(scores: Scores) -> list[str]:
    """One row for each evaluation set: avg@n with its 95 % confidence interval, and pass@k.

    Args:
        scores: The metrics of the evaluation sets.
    """
    return _aligned([[name, *(_cell(tag, values) for tag in _tags(values))] for name, values in scores.items()])


def _tags(values: dict[str, float]) -> list[str]:
    return [tag for tag in values if tag.startswith(("avg@", "pass@")) and not tag.endswith(("_low", "_high"))]


def _cell(tag: str, values: dict[str, float]) -> str:
    interval = f" [{values[f'{tag}_low']:.3f}, {values[f'{tag}_high']:.3f}]" if tag.startswith("avg@") else ""
    return f"{tag} {values[tag]:.3f}{interval}"


def _changed(first: dict[str, float], last: dict[str, float]) -> list[str]:
    return [f"{tag} {first[tag]:.3f} -> {last[tag]:.3f}" for tag in _tags(last) if tag in first]


def _aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines with aligned columns."""
    widths = [max(map(len, cells)) for cells in zip_longest(*rows, fillvalue="")]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _short(path: str) -> str:
    """A path relative to the current folder if it is below it."""
    here = Path(path).absolute()
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else path
