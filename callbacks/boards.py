"""Hands scores, pictures, texts and tables to the loggers: pictures, texts and tables to those that can show them.

| | TensorBoard | W&B | MLflow |
| --- | --- | --- | --- |
| picture | image | image | image with steps |
| text | Markdown, as code | table with one cell | artifact `<tag>.txt` |
| table | Markdown | table | rows of the artifact `<tag>.json`, with their step |

Other loggers receive only metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LONGEST_CELL = 1500
"""Characters of a cell in TensorBoard, which shows a table as a whole; the middle of a longer text is omitted."""

WIDTH = 90
"""Characters of a line of text that TensorBoard shows in a window of 1,400 pixels."""

CONTINUED = "↪ "
"""Begins the rest of a longer line."""


def tensorboards(trainer: Trainer) -> list[SummaryWriter]:
    """The trainer's TensorBoard writers; empty except on rank 0."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]


def log_scores(trainer: Trainer, module: LightningModule, scores: Mapping[str, float], step: int) -> None:
    """Logs the scores of an evaluation, at its end. All ranks must call it.

    Args:
        trainer: The trainer.
        module: The module.
        scores: Values by tag, the same on all ranks.
        step: Optimizer steps of the evaluated weights.
    """
    if trainer.sanity_checking:
        # Lightning drops metrics logged in its sanity check, which is our evaluation before training.
        for logger in trainer.loggers:
            logger.log_metrics(dict(scores), step)
    elif not trainer.predicting:  # Lightning allows no logging there
        # Outside of `fit` Lightning logs at the step that it is given, here that of the same weights in `fit`, or at 0.
        at = {} if trainer.state.fn == "fit" else {"step": float(max(step - 1, 0))}
        module.log_dict({**scores, **at}, sync_dist=True)


def log_picture(trainer: Trainer, tag: str, image: np.ndarray, step: int) -> None:
    """Logs a picture. Ranks other than 0 do nothing, here and below.

    Args:
        trainer: The trainer.
        tag: Name of the picture, the same at every step.
        image: uint8 [H, W, 3].
        step: Optimizer steps.
    """
    for board in tensorboards(trainer):
        board.add_image(tag, image, step, dataformats="HWC")
    for logger in _others(trainer):
        if isinstance(logger, WandbLogger):
            logger.log_image(tag, [image], step)
        else:
            logger.experiment.log_image(str(logger.run_id), image, key=tag, step=step)


def log_text(trainer: Trainer, tag: str, text: str, step: int) -> None:
    """Logs a text, which is shown as it is: no markup in it is rendered.

    Args:
        trainer: The trainer.
        tag: Name of the text.
        text: The text.
        step: Optimizer steps.
    """
    for board in tensorboards(trainer):
        board.add_text(tag, _as_code(text), step)
    for logger in _others(trainer):
        if isinstance(logger, WandbLogger):
            logger.log_text(tag, columns=["text"], data=[[text]], step=step)
        else:
            logger.experiment.log_text(str(logger.run_id), text, f"{tag}.txt")


def log_table(trainer: Trainer, tag: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
    """Logs a table of texts, in which no markup is rendered.

    Args:
        trainer: The trainer.
        tag: Name of the table, the same at every step.
        columns: Names of the columns.
        rows: The rows, with one text for each column.
        step: Optimizer steps.
    """
    for board in tensorboards(trainer):
        board.add_text(tag, markdown(columns, rows), step)
    for logger in _others(trainer):
        if isinstance(logger, WandbLogger):
            logger.log_text(tag, columns=list(columns), data=[list(row) for row in rows], step=step)
        elif rows:
            # MLflow appends the rows to those of earlier steps.
            data = {"step": [step] * len(rows)} | dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
            logger.experiment.log_table(str(logger.run_id), data, f"{tag}.json")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, with its cells as code, so that no Markdown or HTML in them is rendered."""
    lines = [columns, ["---"] * len(columns), *(map(_escape_cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _as_code(text: str) -> str:
    """A block of code in Markdown. TensorBoard would cut off longer lines."""
    return "\n".join(f"    {piece}" for line in text.split("\n") for piece in _pieces(line))


def _pieces(line: str) -> list[str]:
    return [CONTINUED * (i > 0) + line[i : i + WIDTH] for i in range(0, len(line) or 1, WIDTH)]


def _others(trainer: Trainer) -> list[WandbLogger | MLFlowLogger]:
    """The loggers besides TensorBoard that can show more than metrics."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger for logger in loggers if isinstance(logger, (WandbLogger, MLFlowLogger))]


def _escape_cell(text: str) -> str:
    half = LONGEST_CELL // 2
    text = text if len(text) <= LONGEST_CELL else f"{text[:half]} … {text[-half:]}"
    return "`" + text.replace("`", "'").replace("|", "¦").replace("\n", " ⏎ ") + "`"
