"""TensorBoard writers for images, histograms and text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def tensorboards(trainer: Trainer) -> list[SummaryWriter]:
    """The trainer's TensorBoard writers; other loggers receive only metrics."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
