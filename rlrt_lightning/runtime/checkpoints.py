"""Checkpoints that are never half there: how they are written, and which one a run goes on from."""

from __future__ import annotations

import errno
import logging
import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint import CheckpointException, metadata

from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.files import BEFORE, PART, written_aside
from rlrt_lightning.runtime.private.torch import INDEX_CLASSES

log = logging.getLogger(__name__)

DISK = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "ENAMETOOLONG")
    if hasattr(errno, name)
}
"""Errors that the user can mend: the disk is full, or this place cannot be written to."""


SAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""The variable by which torch.load runs no code of a file, whatever its caller has asked for."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a file aside, has it reach the disk, and then gives it its name. Lightning's own writes to the system's
    temporary folder, and copies from there if that is another disk; and it holds the whole file in memory twice."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """See `CheckpointIO.save_checkpoint`.

        Raises:
            ConfigError: If it cannot be written; what bore the name before still does.
        """
        if "://" in str(path):  # object stores show a file when it is complete
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with checkpoint_aside(Path(path)) as aside, aside.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def checkpoint_aside(path: Path) -> Iterator[Path]:
    """`written_aside` for a checkpoint.

    Raises:
        ConfigError: If it cannot be written; nothing of it is left, and what was at the path is still there.
    """
    try:
        with written_aside(path) as aside:
            yield aside
    except BaseException as error:
        if (reason := disk_error(error)) is not None:
            raise ConfigError(
                f"the checkpoint {path} cannot be written: {reason}; what was saved before it is untouched: make room, "
                "or choose another folder by checkpoint.dirpath, and go on with --ckpt_path last"
            ) from error
        raise


def disk_error(error: BaseException | None) -> str | None:
    """What the system says of an error that comes from a full or closed disk, also where torch has wrapped it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None and error.errno in DISK:
            return os.strerror(error.errno)
        if isinstance(error, CheckpointException):  # each rank's own, of a folder of shards
            return next((reason for e, _ in error.failures.values() if (reason := disk_error(e)) is not None), None)
        error = error.__cause__ or error.__context__
    return None


def check_writable(folder: Path) -> None:
    """Finds out before a run what it would find at the end of its first epoch.

    Raises:
        ConfigError: If nothing can be written to the folder.
    """
    probe = folder / f"write-test-{os.getpid()}{PART}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as error:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
        raise ConfigError(
            f"checkpoints cannot be written to {folder}: {error.strerror}; choose another folder by "
            "checkpoint.dirpath or trainer.logger.save_dir, or turn them off by trainer.enable_checkpointing=false"
        ) from error


# -- reading -------------------------------------------------------------------------------------------------------


def newest(folders: Iterable[Path], more: Iterable[Path], resume: bool) -> Path | None:
    """The newest complete checkpoint below some folders; says which newer ones it passes over. None: there are none.

    Args:
        folders: Where to look.
        more: Further checkpoints to choose from.
        resume: It has to hold all that training needs, not weights alone.

    Raises:
        ConfigError: If there are some, and none can be read.
    """
    found = set(more)
    for folder in folders:
        found.update(folder.glob("**/*.ckpt"), folder.glob(f"**/*.ckpt{BEFORE}"))
    passed_over: list[str] = []
    for path in sorted((path for path in found if path.exists()), key=_written, reverse=True):
        wrong = problem(path, resume)
        if wrong is None:
            for other in passed_over:
                log.warning("passed over %s, going on from %s", other, path)
            return path
        passed_over.append(f"{path}, which {wrong}")
    if passed_over:
        raise ConfigError(f"ckpt_path is last, but no checkpoint can be read; the newest is {passed_over[0]}")
    return None


def _written(path: Path) -> int:
    """When a checkpoint was completed, in nanoseconds."""
    last = path / "meta.pt"
    return (last if last.exists() else path).stat().st_mtime_ns


class Index(pickle.Unpickler):
    """The index of a folder of shards, which torch unpickles as it is: here, without what could run code."""

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler.find_class`."""
        own = getattr(metadata, name, None) if module == metadata.__name__ else None
        plain = (
            (isinstance(own, type) and own.__module__ == metadata.__name__)
            or (module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)))
            or (module.startswith("pathlib") and name in ("Path", "PosixPath", "WindowsPath"))
            or (module, name) in INDEX_CLASSES
        )
        if not plain:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


@contextmanager
def no_code() -> Iterator[None]:
    """Has torch load nothing but tensors and plain values, also where it asks itself for more, as for shards."""
    before = os.environ.get(SAFE)
    os.environ[SAFE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SAFE]
        else:
            os.environ[SAFE] = before


def problem(path: Path, resume: bool) -> str | None:
    """What is wrong with a checkpoint, as far as can be told without a model; None if nothing.

    Weights stay on the disk, and nothing that the file may say is run.

    Args:
        path: A file, or a folder of shards.
        resume: It has to hold all that training needs, not weights alone.
    """
    sharded = path.is_dir()
    if sharded and not all((path / name).is_file() for name in (".metadata", "meta.pt")):
        return "is not a complete folder of shards"
    try:
        if sharded:
            with (path / ".metadata").open("rb") as file:
                Index(file).load()
        found = torch.load(path / "meta.pt" if sharded else path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        return "holds objects that are not loaded, because loading them could run code"
    except (PermissionError, FileNotFoundError) as error:
        return f"cannot be read: {error.strerror}"
    except Exception:  # whatever bytes may lead to
        return "is truncated, or not a checkpoint at all"
    needed = {"pytorch-lightning_version", "loops"} if sharded else {"pytorch-lightning_version", "loops", "state_dict"}
    if not isinstance(found, dict) or not needed <= found.keys():
        return "is not a checkpoint of Lightning"
    if resume and "lr_schedulers" not in found:
        return "holds weights alone (checkpoint.save_weights_only), from which training cannot go on"
    return None
