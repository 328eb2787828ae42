"""Writes checkpoints atomically and finds the one to resume from."""

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

DISK_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "ENAMETOOLONG")
    if hasattr(errno, name)
}
"""Errors that the user can fix: the disk is full or the path is not writable."""

WEIGHTS_ONLY_VARIABLE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Environment variable that makes torch.load run no code from a file, regardless of its arguments."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file in the same folder, syncs it to disk and then renames it.

    Lightning's own writes to the system's temporary folder, copies from there if that is another disk, and holds the
    whole file in memory twice.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """See `CheckpointIO.save_checkpoint`.

        Raises:
            ConfigError: If it cannot be written; an existing checkpoint of this name is kept.
        """
        if "://" in str(path):  # object stores write atomically
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with checkpoint_aside(Path(path)) as aside, aside.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def checkpoint_aside(path: Path) -> Iterator[Path]:
    """Like `written_aside`, for a checkpoint: a disk error becomes a `ConfigError`.

    Raises:
        ConfigError: If it cannot be written; the temporary file is removed, and what was at `path` is kept.
    """
    try:
        with written_aside(path) as aside:
            yield aside
    except BaseException as error:
        if (reason := disk_error(error)) is not None:
            raise ConfigError(
                f"the checkpoint {path} cannot be written: {reason}; earlier checkpoints are intact; free disk space "
                "or set checkpoint.dirpath to another folder, and resume with --ckpt_path last"
            ) from error
        raise


def disk_error(error: BaseException | None) -> str | None:
    """The system's message for an error in `DISK_ERRORS`, also if torch has wrapped it; None for any other error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None and error.errno in DISK_ERRORS:
            return os.strerror(error.errno)
        if isinstance(error, CheckpointException):  # holds each rank's error, for a folder of shards
            return next((reason for e, _ in error.failures.values() if (reason := disk_error(e)) is not None), None)
        error = error.__cause__ or error.__context__
    return None


def check_writable(folder: Path) -> None:
    """Checks before a run that its checkpoints can be written.

    Raises:
        ConfigError: If the folder is not writable.
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
            f"checkpoints cannot be written to {folder}: {error.strerror}; set checkpoint.dirpath or "
            "trainer.logger.save_dir to another folder, or trainer.enable_checkpointing=false"
        ) from error


# -- reading -------------------------------------------------------------------------------------------------------


def newest(folders: Iterable[Path], more: Iterable[Path], resume: bool) -> Path | None:
    """The newest usable checkpoint, or None if there is no checkpoint. Warns of newer ones that are skipped.

    Args:
        folders: Folders to search recursively.
        more: Further candidates.
        resume: Whether training resumes from it; a checkpoint of weights alone is skipped then.

    Raises:
        ConfigError: If there are checkpoints but none is usable.
    """
    found = set(more)
    for folder in folders:
        found.update(folder.glob("**/*.ckpt"), folder.glob(f"**/*.ckpt{BEFORE}"))
    skipped: list[str] = []
    for path in sorted((path for path in found if path.exists()), key=completed_at, reverse=True):
        wrong = problem(path, resume)
        if wrong is None:
            for other in skipped:
                log.warning("skipped %s; using %s", other, path)
            return path
        skipped.append(f"{path}, which {wrong}")
    if skipped:
        raise ConfigError(f"ckpt_path is last, but no checkpoint can be used; the newest is {skipped[0]}")
    return None


def completed_at(path: Path) -> int:
    """Time at which a checkpoint was completed, in nanoseconds."""
    last = path / "meta.pt"
    return (last if last.exists() else path).stat().st_mtime_ns


class Index(pickle.Unpickler):
    """Reads the index of a folder of shards without running code from it; torch's own reader is not restricted."""

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler.find_class`."""
        own = getattr(metadata, name, None) if module == metadata.__name__ else None
        safe = (
            (isinstance(own, type) and own.__module__ == metadata.__name__)
            or (module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)))
            or (module.startswith("pathlib") and name in ("Path", "PosixPath", "WindowsPath"))
            or (module, name) in INDEX_CLASSES
        )
        if not safe:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


@contextmanager
def no_code() -> Iterator[None]:
    """Restricts torch.load to tensors and plain values, also where torch itself disables that, as for shards."""
    before = os.environ.get(WEIGHTS_ONLY_VARIABLE)
    os.environ[WEIGHTS_ONLY_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[WEIGHTS_ONLY_VARIABLE]
        else:
            os.environ[WEIGHTS_ONLY_VARIABLE] = before


def problem(path: Path, resume: bool) -> str | None:
    """Checks a checkpoint without a model, and returns what is wrong with it, or None.

    Weights are not read from disk, and no code in the file runs.

    Args:
        path: A file, or a folder of shards.
        resume: Whether training resumes from it; a checkpoint of weights alone does not suffice then.
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
        return "holds pickled objects that could run code when loaded"
    except (PermissionError, FileNotFoundError) as error:
        return f"cannot be read: {error.strerror}"
    except Exception:  # corrupt bytes can raise anything
        return "is truncated or not a checkpoint"
    needed = {"pytorch-lightning_version", "loops"} if sharded else {"pytorch-lightning_version", "loops", "state_dict"}
    if not isinstance(found, dict) or not needed <= found.keys():
        return "is not a Lightning checkpoint"
    if resume and "lr_schedulers" not in found:
        return "holds only weights (checkpoint.save_weights_only), from which training cannot resume"
    return None
