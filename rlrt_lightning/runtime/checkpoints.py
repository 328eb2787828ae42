"""Writes checkpoints atomically and finds the one to resume from."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint import CheckpointException, metadata

from rlrt_lightning.runtime.errors import ConfigError

log = logging.getLogger(__name__)

PART, PREVIOUS = ".part", ".before"
"""Suffix of a checkpoint that is being written, and of the previous one while it is being replaced."""

DISK_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "ENAMETOOLONG")
    if hasattr(errno, name)
}
"""Errors that the user can fix: the disk is full or the path is not writable."""

WEIGHTS_ONLY_VARIABLE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Environment variable that makes torch.load run no code from a file, regardless of its arguments."""

SAFE_GLOBALS = {("torch.serialization", "_get_layout"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
"""Allowed in the index of a folder of shards, besides torch's metadata classes, sizes, dtypes and paths."""


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
        with atomic_write(Path(path)) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, and renames it to `path` on success.

    Raises:
        ConfigError: If it cannot be written; the temporary file is removed, and what was at `path` is kept.
    """
    temporary = path.with_name(path.name + PART)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        yield temporary
        _rename(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            remove(temporary)
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


def _rename(temporary: Path, path: Path) -> None:
    """Moves a complete checkpoint to its path. A folder cannot replace another atomically, so that is moved first."""
    previous = path.with_name(path.name + PREVIOUS)
    if (path.is_dir() and not path.is_symlink()) or (temporary.is_dir() and path.exists()):
        remove(previous)
        path.rename(previous)
    os.replace(temporary, path)
    remove(previous)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Syncs a folder's entries to disk. Windows cannot open folders, so it does nothing there."""
    try:
        folder = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove(path: Path) -> None:
    """Removes a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
        found.update(folder.glob("**/*.ckpt"), folder.glob(f"**/*.ckpt{PREVIOUS}"))
    skipped: list[str] = []
    for path in sorted((path for path in found if path.exists()), key=_completed_at, reverse=True):
        wrong = problem(path, resume)
        if wrong is None:
            for other in skipped:
                log.warning("skipped %s; using %s", other, path)
            return path
        skipped.append(f"{path}, which {wrong}")
    if skipped:
        raise ConfigError(f"ckpt_path is last, but no checkpoint can be used; the newest is {skipped[0]}")
    return None


def _completed_at(path: Path) -> int:
    """Time at which a checkpoint was completed, in nanoseconds."""
    last = path / "meta.pt"
    return (last if last.exists() else path).stat().st_mtime_ns


class _SafeUnpickler(pickle.Unpickler):
    """Reads the index of a folder of shards without running code from it; torch's own reader is not restricted."""

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler.find_class`."""
        own = getattr(metadata, name, None) if module == metadata.__name__ else None
        safe = (
            (isinstance(own, type) and own.__module__ == metadata.__name__)
            or (module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)))
            or (module.startswith("pathlib") and name in ("Path", "PosixPath", "WindowsPath"))
            or (module, name) in SAFE_GLOBALS
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
                _SafeUnpickler(file).load()
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
