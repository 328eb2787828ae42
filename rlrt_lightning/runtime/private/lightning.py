"""Private names of Lightning."""

from __future__ import annotations

from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy


def saves_within_epochs(callback: ModelCheckpoint) -> dict[str, Any]:
    """The settings of a `ModelCheckpoint` that save within epochs, by name.

    Two of them are private attributes. Without this check, a checkpoint could be written where a run cannot be resumed
    exactly.
    """
    return {
        "every_n_train_steps": callback._every_n_train_steps,
        "train_time_interval": callback._train_time_interval,
        "save_on_exception": callback.save_on_exception,
    }


def save_last(callback: ModelCheckpoint, trainer: Trainer) -> None:
    """Writes last.ckpt unless the callback has saved since the last optimizer step.

    Lightning's public hooks write it only if the epoch is among the best; a monitored run would then resume from an
    earlier epoch than its last. The private method names the file, writes it, and removes the previous one. With
    `save_last: link` it would link an older epoch, because this one has no other file; so it is written.
    """
    if callback._last_global_step_saved != trainer.global_step:
        setting, callback.save_last = callback.save_last, True
        try:
            callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
        finally:
            callback.save_last = setting


def shard_over_all_ranks(strategy: ModelParallelStrategy) -> None:
    """Makes a strategy shard weights over the processes of all nodes. Call it before the device mesh is created.

    The constructor takes the number of shards, but the trainer sets the number of processes later; "auto" means the
    number of nodes, so Lightning would reject the mesh for not matching the number of processes.
    """
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes
