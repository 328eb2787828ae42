"""What several callbacks need: the parts of a run, and settings that can be published."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lightning import Callback, Trainer

if TYPE_CHECKING:
    from rlrt_lightning.datamodule import RolloutDataModule

C = TypeVar("C", bound=Callback)


def data_of(trainer: Trainer) -> RolloutDataModule:
    """The trainer's data module."""
    return cast("RolloutDataModule", cast(Any, trainer).datamodule)


def callbacks_of(trainer: Trainer, kind: type[C]) -> list[C]:
    """The trainer's callbacks of a class."""
    return [callback for callback in cast(Any, trainer).callbacks if isinstance(callback, kind)]


def without_folders(value: Any) -> Any:
    """A setting as it is published: of a local path only the last part."""
    if isinstance(value, dict):
        return {name: without_folders(item) for name, item in value.items()}
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return list(value) if isinstance(value, tuple) else value
