"""The folder of a run: finds or creates it, and refuses to overwrite files there that the run did not create."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.files import EVALUATION, RUNS, new_folder

UNLOGGED = "no_logger"
"""Name of the folders of runs without a logger that were started from Python."""

CHECKPOINTS = "checkpoints"
"""Folder of a run for its checkpoints."""

_folders: WeakKeyDictionary[Any, Path] = WeakKeyDictionary()
_chosen: WeakKeyDictionary[Any, Path] = WeakKeyDictionary()
_created: WeakKeyDictionary[Any, set[Path]] = WeakKeyDictionary()
_unused: dict[Path, list[Path]] = {}  # folders created by this process and not kept yet, with their new parents
_continued: set[Path] = set()  # folders of runs that this process resumes


# -- the run's folder ----------------------------------------------------------------------------------------------


def run_folder(trainer: Trainer) -> Path:
    """The run's own folder, which also holds Lightning's checkpoints. All ranks must call it; rank 0 broadcasts.

    - Command line: the folder passed to `choose_folder`.
    - TensorBoard and CSV loggers: the logger's folder.
    - Other loggers share a folder between runs or have none on this machine (a server, a database, a URL):
      `<folder>/<name>/<version>` below the logger's folder or `trainer.default_root_dir`.
    - No logger: `trainer.default_root_dir` if it is empty, otherwise a new folder below it.
    """
    run = _run(trainer)
    if run not in _folders:
        _folders[run] = Path(trainer.strategy.broadcast(_folder(trainer) if trainer.is_global_zero else Path()))
    return _folders[run]


def choose_folder(trainer: Trainer, folder: Path) -> None:
    """Makes a folder that of the trainer's run. Call it on rank 0, before the run starts."""
    _chosen[_run(trainer)] = folder


def run_of(checkpoint: str | Path | None) -> Path | None:
    """The folder of the run that saved a checkpoint; None if the checkpoint is not in a run's folder."""
    if checkpoint is None or "://" in str(checkpoint):
        return None
    parent = Path(checkpoint).parent
    return parent.parent if parent.name == CHECKPOINTS else None


def evaluation_folder(trainer: Trainer, step: int) -> Path:
    """The folder for the results of an evaluation. All ranks must call it.

    - Command line: the folder passed to `choose_folder`, which is that of the evaluation.
    - Python: a new folder `evaluation/step-<step>[-n]` in the run's folder.

    Args:
        trainer: The trainer.
        step: Optimizer steps of the evaluated weights.
    """
    run, own = run_folder(trainer), Path()
    if trainer.is_global_zero:
        own = run if _run(trainer) in _chosen else create_folder(run / EVALUATION, f"step-{step}", temporary=False)
    return Path(trainer.strategy.broadcast(own))


def numbered(parent: Path, name: str) -> Iterator[Path]:
    """The existing folders `<name>`, `<name>-2`, `<name>-3`, ... in a folder."""
    found = sorted(parent.glob(f"{name}*")) if parent.is_dir() else []
    yield from (path for path in found if path.is_dir() and re.fullmatch(rf"{re.escape(name)}(-\d+)?", path.name))


def create_folder(parent: Path, name: str, temporary: bool = True) -> Path:
    """Creates a folder as `new_folder` does.

    Args:
        parent: The folder that will hold it.
        name: Its name.
        temporary: `end_runs` removes it again unless `keep_folder` is called.
    """
    created = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    path = new_folder(parent, name)
    if temporary:
        _unused[path] = created
    return path


def continue_folder(folder: Path) -> None:
    """Lets the run that this process resumes replace files in its folder."""
    _continued.add(folder)


def is_continued(folder: Path) -> bool:
    """Whether the run in the folder was resumed by this process (`continue_folder`)."""
    return folder in _continued


def keep_folder(trainer: Trainer) -> None:
    """Keeps the run's folder. Call it once there is something in it that the user may want."""
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        _unused.pop(_folders.get(_run(trainer), Path()), None)


def end_runs() -> None:
    """Forgets the resumed runs, and removes the folders that this process has created but not kept: those of runs that
    failed to start."""
    _continued.clear()
    while _unused:
        folder, parents = _unused.popitem()
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # a parent that is not empty
            for parent in parents:
                parent.rmdir()


# -- files in it ---------------------------------------------------------------------------------------------------


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
    """Checks for an existing metrics.csv, which CSVLogger would delete when it is first used. A resumed run keeps that
    of its beginning under another name. Call it on one rank only.

    Raises:
        ConfigError: If it exists and this run did not create it.
    """
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and "://" not in logger.log_dir:
            metrics = Path(logger.log_dir) / "metrics.csv"
            _claim(logger, metrics)
            if metrics.parent in _continued and metrics.exists():
                metrics.rename(free_path(metrics))


def free_path(path: Path) -> Path:
    """The path, or `<stem>-2<suffix>`, `<stem>-3<suffix>`, ... if it exists."""
    others = (path.with_stem(f"{path.stem}-{n}") for n in count(2))
    return next(other for other in chain([path], others) if not other.exists())


def _claim(run: Any, path: Path) -> None:
    created = _created.setdefault(run, set())
    if path not in created and path.parent not in _continued and occupied(path):
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
    if logger in _chosen:
        return _chosen[logger]
    if logger is trainer:
        root = Path(trainer.default_root_dir)
        return create_folder(root / RUNS, UNLOGGED, temporary=False) if occupied(root) else root
    if isinstance(logger, (TensorBoardLogger, CSVLogger)) and "://" not in logger.log_dir:
        return Path(logger.log_dir)
    # Like Lightning's checkpoints: all runs of these loggers share a save_dir.
    own_folder = logger.save_dir is not None and "://" not in str(logger.save_dir)
    parent = Path(logger.save_dir if own_folder else trainer.default_root_dir) / str(logger.name)
    if logger.version is None:
        return create_folder(parent, "run", temporary=False)
    return parent / (logger.version if isinstance(logger.version, str) else f"version_{logger.version}")
