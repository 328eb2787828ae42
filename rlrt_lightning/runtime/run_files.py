"""Finds the folder of a run, and refuses to overwrite files there that the run did not create."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from rlrt_lightning.runtime.errors import ConfigError

UNLOGGED = Path("runs") / "no_logger"
"""Holds the folders of runs without a logger, below a default_root_dir that is not empty."""

_folders: WeakKeyDictionary[Any, Path] = WeakKeyDictionary()
_created: WeakKeyDictionary[Any, set[Path]] = WeakKeyDictionary()


def run_folder(trainer: Trainer) -> Path:
    """The run's own folder, which also holds Lightning's checkpoints. All ranks must call it; rank 0 broadcasts.

    - TensorBoard and CSV loggers: the logger's folder.
    - Other loggers share a folder between runs or have none on this machine (a server, a database, a URL):
      `<folder>/<name>/<version>` below the logger's folder or `trainer.default_root_dir`.
    - No logger: `trainer.default_root_dir` if it is empty, otherwise a new folder below it.
    """
    run = _run(trainer)
    if run not in _folders:
        _folders[run] = Path(trainer.strategy.broadcast(_folder(trainer) if trainer.is_global_zero else Path()))
    return _folders[run]


def claim_path(trainer: Trainer, name: str) -> Path:
    """The path of a file or folder of the run. Call it on all ranks, before anything is written there.

    Args:
        trainer: The trainer.
        name: Name within the run's folder.

    Raises:
        ConfigError: If it exists and this run did not create it.
    """
    path = run_folder(trainer) / name
    if trainer.is_global_zero:
        _claim(_run(trainer), path)
    return path


def claim_metrics(trainer: Trainer) -> None:
    """Checks for an existing metrics.csv before CSVLogger is first used and deletes it. Call it on one rank only.

    Raises:
        ConfigError: If it exists and this run did not create it.
    """
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and "://" not in logger.log_dir:
            _claim(logger, Path(logger.log_dir) / "metrics.csv")


def _claim(run: Any, path: Path) -> None:
    created = _created.setdefault(run, set())
    if path not in created and occupied(path):
        raise ConfigError(
            f"{path} already exists and would be overwritten; give trainer.logger another save_dir, name or version"
        )
    created.add(path)


def occupied(path: Path) -> bool:
    """Whether the path is a file or a non-empty folder."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _run(trainer: Trainer) -> Any:
    """The object that identifies the run: the logger, because trainers that share one write to the same folder, or the
    trainer without one."""
    return trainer if trainer.fast_dev_run or trainer.logger is None else trainer.logger  # type: ignore[attr-defined]


def _folder(trainer: Trainer) -> Path:
    logger = _run(trainer)
    if logger is trainer:
        root = Path(trainer.default_root_dir)
        return _new_folder(root / UNLOGGED) if occupied(root) else root
    if isinstance(logger, (TensorBoardLogger, CSVLogger)) and "://" not in logger.log_dir:
        return Path(logger.log_dir)
    # Like Lightning's checkpoints: all runs of these loggers share a save_dir.
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
