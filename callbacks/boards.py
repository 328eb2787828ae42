"""Where pictures, histograms, texts and files go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def tensorboards(trainer: Trainer) -> list[SummaryWriter]:
    """The trainer's TensorBoard writers; other loggers get the figures only."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def run_folder(trainer: Trainer) -> Path:
    """The run's own folder, in which Lightning's checkpoints are too.

    That of the logger, for loggers of TensorBoard and CSV files. Other loggers may have a folder for all of their runs,
    or none on this machine (a server, a database, an address of the web): `<folder>/<name>/<version>` then, below the
    logger's folder or `trainer.default_root_dir`. Without a logger it is `trainer.default_root_dir`.

    All ranks have to ask: the first tells the others.
    """
    return Path(trainer.strategy.broadcast(str(_folder(trainer)) if trainer.is_global_zero else ""))


def _folder(trainer: Trainer) -> Path:
    logger, root = trainer.logger, trainer.default_root_dir
    if logger is None:
        return Path(root)
    if isinstance(logger, (TensorBoardLogger, CSVLogger)) and "://" not in logger.log_dir:
        return Path(logger.log_dir)
    save_dir = logger.save_dir
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    own = root if save_dir is None or "://" in str(save_dir) else save_dir
    return Path(own) / str(logger.name) / version
