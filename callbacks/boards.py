"""Where pictures, histograms and texts go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def tensorboards(trainer: Trainer) -> list[SummaryWriter]:
    """The trainer's TensorBoard writers; other loggers get the figures only."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
