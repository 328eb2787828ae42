"""The folder of a run, and that nothing is overwritten in it that the run did not make."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from rlrt_lightning.runtime.errors import ConfigError

UNLOGGED = Path("runs") / "no_logger"
"""Below the trainer's default_root_dir, unless that is empty: the folders of runs without a logger."""

_folders: WeakKeyDictionary[Any, Path] = WeakKeyDictionary()
_made: WeakKeyDictionary[Any, set[Path]] = WeakKeyDictionary()


def run_folder(trainer: Trainer) -> Path:
    """The run's own folder, in which Lightning's checkpoints are too.

    That of the logger, for loggers of TensorBoard and CSV files. Other loggers may have a folder for all of their runs,
    or none on this machine (a server, a database, an address of the web): `<folder>/<name>/<version>` then, below the
    logger's folder or `trainer.default_root_dir`. Without a logger it is `trainer.default_root_dir` if that is empty,
    and else a new folder below it.

    All ranks have to ask: the first tells the others.
    """
    run = _run(trainer)
    if run not in _folders:
        _folders[run] = Path(trainer.strategy.broadcast(_folder(trainer) if trainer.is_global_zero else Path()))
    return _folders[run]


def own(trainer: Trainer, name: str) -> Path:
    """The path of a file or folder of the run, to be asked for before anything is written. All ranks have to ask.

    Args:
        trainer: The trainer.
        name: Its name in the run's folder.

    Raises:
        ConfigError: If there is one already that this run did not make.
    """
    path = run_folder(trainer) / name
    if trainer.is_global_zero:
        _claim(_run(trainer), path)
    return path


def own_metrics(trainer: Trainer) -> None:
    """Looks for metrics.csv before the loggers are used: CSVLogger deletes it at its first use. For one rank only.

    Raises:
        ConfigError: If there is one that this run did not make.
    """
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and "://" not in logger.log_dir:
            _claim(logger, Path(logger.log_dir) / "metrics.csv")


def _claim(run: Any, path: Path) -> None:
    made = _made.setdefault(run, set())
    if path not in made and occupied(path):
        raise ConfigError(
            f"{path} is there already and would be overwritten; give trainer.logger another save_dir, name or version"
        )
    made.add(path)


def occupied(path: Path) -> bool:
    """Whether there is a file, or a folder that is not empty."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _run(trainer: Trainer) -> Any:
    """What stands for the run: trainers that share a logger write to one folder."""
    return trainer if trainer.fast_dev_run or trainer.logger is None else trainer.logger  # type: ignore[attr-defined]


def _folder(trainer: Trainer) -> Path:
    logger = _run(trainer)
    if logger is trainer:
        root = Path(trainer.default_root_dir)
        return _new_folder(root / UNLOGGED) if occupied(root) else root
    if isinstance(logger, (TensorBoardLogger, CSVLogger)) and "://" not in logger.log_dir:
        return Path(logger.log_dir)
    # As Lightning places checkpoints; the save_dir of other loggers is shared by all their runs.
    own_folder = logger.save_dir is not None and "://" not in str(logger.save_dir)
    parent = Path(logger.save_dir if own_folder else trainer.default_root_dir) / str(logger.name)
    if logger.version is None:
        return _new_folder(parent)
    return parent / (logger.version if isinstance(logger.version, str) else f"version_{logger.version}")


def _new_folder(parent: Path) -> Path:
    number = 0
    while True:
        try:
            (parent / f"version_{number}").mkdir(parents=True)
            return parent / f"version_{number}"
        except FileExistsError:
            number += 1
