"""Private names of Lightning."""

from __future__ import annotations

from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy


def saves_within_epochs(callback: ModelCheckpoint) -> dict[str, Any]:
    """The settings by which a `ModelCheckpoint` saves within epochs, by name.

    Lightning keeps two of them in private attributes only. Without them a run could be saved where it cannot be resumed
    exactly.
    """
    return {
        "every_n_train_steps": callback._every_n_train_steps,
        "train_time_interval": callback._train_time_interval,
        "save_on_exception": callback.save_on_exception,
    }


def save_last(callback: ModelCheckpoint, trainer: Trainer) -> None:
    """Writes last.ckpt unless the callback has saved since the last optimizer step.

    Lightning's public hooks write it only where the epoch is among the best. Its method names the file, links or copies
    it, and removes the one before; without it a monitored run would be resumed from an earlier epoch than its last.
    """
    if callback._last_global_step_saved != trainer.global_step:
        callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))


def shard_over_all_ranks(strategy: ModelParallelStrategy) -> None:
    """Has a strategy shard weights over the processes of all nodes, before its device mesh is made.

    The constructor wants the number of processes, which the trainer sets later; its "auto" is the number of nodes.
    Without it Lightning refuses the mesh, whose size is not the number of processes.
    """
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes
