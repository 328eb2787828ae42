"""The tags of metrics in TensorBoard, which shows a card for each tag and one group of cards for each prefix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

INTERVALS = "intervals/"
"""Prefix of the bounds of confidence intervals in TensorBoard. In the group of their value they would be two of every
three cards."""

BOUND = re.compile(r"(eval/.+@\d+|teacher/(student_)?accuracy)_(low|high)")
"""Tags of the bounds of confidence intervals."""


def shown_tag(tag: str) -> str:
    """The tag under which TensorBoard shows a metric: that of the metric, or for a bound of a confidence interval one
    in a group of its own."""
    return f"{INTERVALS}{tag}" if BOUND.fullmatch(tag) else tag


def logged_tag(tag: str) -> str:
    """The inverse of `shown_tag`."""
    return tag.removeprefix(INTERVALS)


class BoardLogger(TensorBoardLogger):
    """Lightning's `TensorBoardLogger`, which it replaces in every run (`Dashboard`), with two differences: it writes
    no curve `epoch`, which is a straight line, and groups the bounds of confidence intervals (`shown_tag`)."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """See `TensorBoardLogger.log_metrics`."""
        super().log_metrics({shown_tag(tag): value for tag, value in metrics.items() if tag != "epoch"}, step)


def adopt(loggers: Iterable[Logger]) -> None:
    """Turns every plain `TensorBoardLogger` into a `BoardLogger`. Only a logger sees all that is logged: Lightning adds
    `epoch` to what modules log. The objects are modified in place, because user code may hold references to them.

    Args:
        loggers: The trainer's loggers.
    """
    for logger in loggers:
        if type(logger) is TensorBoardLogger:
            logger.__class__ = BoardLogger


def logger_names(loggers: Iterable[Logger]) -> list[str]:
    """The names of the loggers' classes, the same before and after `adopt`."""
    return [(TensorBoardLogger if type(each) is BoardLogger else type(each)).__name__ for each in loggers]
