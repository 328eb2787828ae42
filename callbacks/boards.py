"""Where pictures, histograms, texts and files go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def tensorboards(trainer: Trainer) -> list[SummaryWriter]:
    """The trainer's TensorBoard writers; other loggers get the figures only."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def run_folder(trainer: Trainer) -> Path:
    """The run's own folder: its logger's, or the trainer's where there is no logger. All ranks have to ask: the first
    tells the others."""
    return Path(trainer.log_dir or trainer.default_root_dir)
