"""Where the files of a run go: `<root>/<task>/<method>-<seed>[-n]`, decided from the settings before the run starts."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only

from rlrt_lightning.runtime.checkpoints import completed_at, newest, problem
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.files import EVALUATION, RUNS
from rlrt_lightning.runtime.run_files import continue_folder, create_folder, numbered, run_of

DATA_FILES = (".parquet", ".jsonl", ".json", ".csv")


@dataclass(frozen=True)
class Place:
    """The folder of a run, before its number is known.

    Args:
        root: Folder of all runs.
        name: Name of the task, or the logger's `name`.
        version: Method and seed, or the logger's `version`.
        fixed: Whether the version is the logger's, so that no number is added to it.
        checkpoints: Folders of checkpoints that the user has set; empty if they are in the run's folder.
    """

    root: Path
    name: str
    version: str
    fixed: bool = False
    checkpoints: tuple[Path, ...] = ()

    @property
    def parent(self) -> Path:
        """Folder of the runs with the same task."""
        return self.root / self.name

    @property
    def runs(self) -> list[Path]:
        """Folders of the runs with the same task, method and seed."""
        return [self.parent / self.version] if self.fixed else list(numbered(self.parent, self.version))


def place_of(settings: Any) -> Place:
    """The place of a run.

    Args:
        settings: The command's settings.
    """
    loggers = settings.trainer.logger
    first = (loggers[0] if loggers else None) if isinstance(loggers, list) else loggers
    given = _folder_settings(first) if hasattr(first, "class_path") else {}
    version, default = given.get("version"), Path(settings.trainer.default_root_dir or "") / RUNS
    callbacks = settings.trainer.callbacks or []
    parts = [settings.checkpoint, *(part.get("init_args") or {} for part in _listed(callbacks))]
    return Place(
        root=Path(os.path.expandvars(given["save_dir"])).expanduser() if "save_dir" in given else default,
        name=str(given.get("name", task_name(settings.data.task))),
        version=f"version_{version}" if isinstance(version, int) else version or _version(settings),
        fixed=version is not None,
        checkpoints=tuple(Path(folder) for part in parts if (folder := part.get("dirpath"))),
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _version(settings: Any) -> str:
    return f"{settings.model.method.class_path.rpartition('.')[2].lower()}-{settings.data.seed}"


def task_name(task: Any) -> str:
    """The name of a task for folders: that of its class, data or generator, such as `last-digit` or `gsm8k`.

    Args:
        task: The setting `data.task`, with `class_path` and `init_args`.
    """
    if task is None:
        return "last-digit"
    settings, kind = task.get("init_args") or {}, task.class_path.rpartition(".")[2]
    source = settings.get("train") or settings.get("heldout") if kind == "DatasetTask" else None
    name: Any
    if isinstance(source, str):
        name = Path(source).stem if source.endswith(DATA_FILES) else Path(source.partition(":")[0]).name
    else:
        name = settings.get("name") if kind == "ReasoningGym" else re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", kind)
    return re.sub(r"[^a-z0-9._-]+", "-", str(name).lower()).strip("-.") or "task"


def _folder_settings(logger: Any) -> dict[str, Any]:
    """A logger's settings that determine the run's folder, without those at the defaults of its class."""
    module, _, name = logger.class_path.rpartition(".")
    cls, settings = getattr(sys.modules[module], name), logger.get("init_args") or {}
    keys = ("save_dir", "name", "version") if issubclass(cls, (TensorBoardLogger, CSVLogger)) else ("save_dir",)
    if issubclass(cls, MLFlowLogger):
        return {}  # its folder is shared by all runs
    found = {key: settings.get(key) for key in keys}
    defaults = signature(cls).parameters
    found = {k: v for k, v in found.items() if v is not None and not (k in defaults and v == defaults[k].default)}
    return {key: value for key, value in found.items() if "://" not in str(value)}


def logger_settings(cls: type, settings: dict[str, Any], place: Place, folder: Path) -> dict[str, Any]:
    """The arguments with which a logger's constructor is called, so that its files are in the run's folder.

    Args:
        cls: The logger's class.
        settings: The arguments given by the user.
        place: The run's place.
        folder: The run's folder.
    """
    if issubclass(cls, (TensorBoardLogger, CSVLogger)) and "://" not in str(settings["save_dir"]):
        return {**settings, "save_dir": str(folder.parent.parent), "name": folder.parent.name, "version": folder.name}
    ours: dict[str, Any] = {}
    if issubclass(cls, WandbLogger):
        ours = {"save_dir": str(folder), "name": folder.name}
        if "WANDB_PROJECT" not in os.environ:
            ours["project"] = place.name
    elif issubclass(cls, MLFlowLogger):
        ours = {"experiment_name": place.name, "run_name": folder.name, "save_dir": str(place.root / "mlruns")}
    defaults = signature(cls).parameters
    return {**settings, **{name: ours[name] for name in ours if settings.get(name) == defaults[name].default}}


def checkpoint_of(path: str | None, place: Place, root: str | None, resume: bool) -> str | None:
    """The path of the checkpoint that a command reads.

    Args:
        path: The setting `ckpt_path`. `last` is the newest complete checkpoint of the runs with the same task, method
            and seed, or of the folder `checkpoint.dirpath`; under SLURM this includes that of a requeued job.
        place: The place of the run.
        root: The setting `trainer.default_root_dir`.
        resume: Whether training resumes from it; a checkpoint of weights alone does not suffice then.

    Raises:
        ConfigError: If there is no checkpoint.
    """
    if path == "best":
        raise ConfigError("ckpt_path: best is known only within its own run; give the checkpoint's path")
    if path != "last":
        if path and "://" not in path and not Path(path).exists():
            raise ConfigError(f"ckpt_path: there is no checkpoint at {path}")
        return path
    requeued = Path(root or Path.cwd()).glob("hpc_ckpt_*.ckpt") if SLURMEnvironment.detect() else ()
    found = newest(place.checkpoints or place.runs, requeued, resume)
    if found is None:
        looked = " or ".join(map(str, place.checkpoints or [place.parent / place.version]))
        others = _with_checkpoints(place.parent) if not place.checkpoints else []
        hint = f"; the runs in {place.parent} are {', '.join(others)}" if others else ""
        raise ConfigError(
            f"ckpt_path is last, but there is no checkpoint in {looked}; give the checkpoint's path{hint}"
        )
    return str(found)


def _with_checkpoints(parent: Path) -> list[str]:
    return sorted({path.parent.parent.name for path in parent.glob("*/checkpoints/*.ckpt")})


def is_first_process() -> bool:
    """Whether this process is rank 0, before the trainer knows its ranks: on each further node of a cluster without a
    scheduler the first process has no rank yet, but `NODE_RANK`."""
    return rank_zero_only.rank == 0 and os.environ.get("NODE_RANK", "0") == "0"  # type: ignore[attr-defined]


def make_folder(command: str, place: Place, checkpoint: str | None) -> Path:
    """The folder of a run, new unless the run is resumed. Call it on one rank only.

    - `fit`: `<root>/<task>/<method>-<seed>[-n]`. A run that is resumed from its newest checkpoint keeps its folder.
    - `validate`, `test`, `predict`: `evaluation/step-<step>[-n]` in the folder of the run that saved the checkpoint, or
      `<root>/<task>/evaluation[-n]`.

    Args:
        command: The subcommand.
        place: The place of the run.
        checkpoint: Path of the checkpoint.

    Raises:
        ConfigError: If it cannot be created.
    """
    run = run_of(checkpoint)
    ours = run is not None and run.resolve() in [path.resolve() for path in place.runs]
    try:
        if run is not None and ours and command == "fit" and _is_newest(Path(str(checkpoint)), run):
            continue_folder(run)
            return run
        if place.fixed and not (ours and command != "fit"):
            folder = place.parent / place.version
            return folder if folder.exists() else create_folder(place.parent, place.version)
        if command == "fit":
            return create_folder(place.parent, place.version)
        if run is not None:
            return create_folder(run / EVALUATION, f"step-{_steps(Path(str(checkpoint)))}")
        return create_folder(place.parent, EVALUATION)
    except OSError as error:
        folder = run / EVALUATION if run is not None and command != "fit" else place.parent
        raise ConfigError(f"trainer.logger.save_dir: {folder} cannot be written to: {error.strerror}") from error


def _is_newest(checkpoint: Path, run: Path) -> bool:
    """Whether the run has no usable checkpoint of a later step."""
    since, steps = completed_at(checkpoint), _steps(checkpoint)
    later = (path for path in run.glob("**/*.ckpt") if completed_at(path) > since)
    return all(problem(path, resume=True) is not None or _steps(path) <= steps for path in later)


def _steps(path: Path) -> int:
    """The number of optimizer steps after which a checkpoint was saved."""
    found = torch.load(path / "meta.pt" if path.is_dir() else path, map_location="cpu", weights_only=True, mmap=True)
    return int(found["global_step"])
