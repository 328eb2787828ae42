"""Checks ranges of the trainer's settings that Lightning does not check, or checks only after rollouts are drawn."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.accelerators import CPUAccelerator

from rlrt_lightning.runtime.errors import ConfigError, check_ranges

MIN_CPU_PROCESSES = 8
"""Processes allowed on any machine, even with fewer CPUs, for experiments."""


def check_limits(trainer: Any) -> None:
    """Refuses settings that would fail within Lightning, train nothing or start hundreds of processes.

    Args:
        trainer: The trainer.

    Raises:
        ConfigError: If a setting is out of range.
    """
    clip, every, interval = trainer.gradient_clip_val, trainer.check_val_every_n_epoch, trainer.val_check_interval
    most = max(MIN_CPU_PROCESSES, os.cpu_count() or 1)
    devices = trainer.num_devices if isinstance(trainer.accelerator, CPUAccelerator) else 1
    batches = trainer.accumulate_grad_batches
    check_ranges(
        "trainer",
        {
            "accumulate_grad_batches": (batches, batches >= 1, "1 or more"),
            "gradient_clip_val": (clip, clip is None or 0 <= clip < math.inf, "0 or more, or null"),
            "check_val_every_n_epoch": (every, every is None or every >= 1, "1 or more, or null"),
            "val_check_interval": (interval, not isinstance(interval, (int, float)) or interval > 0, "above 0"),
            "min_epochs": (trainer.min_epochs, (trainer.min_epochs or 0) >= 0, "0 or more, or null"),
            "min_steps": (trainer.min_steps, (trainer.min_steps or 0) >= 0, "0 or more, or null"),
            "log_every_n_steps": (trainer.log_every_n_steps, trainer.log_every_n_steps >= 0, "0 or more"),
            "num_sanity_val_steps": (trainer.num_sanity_val_steps, trainer.num_sanity_val_steps >= 0, "-1 or more"),
            "devices": (devices, devices <= most, f"at most {most} for the CPUs of this machine"),
        },
    )


def check_folders(trainer: Trainer) -> None:
    """Refuses logger folders that cannot be created or written to.

    Args:
        trainer: The trainer.

    Raises:
        ConfigError: If a folder is not writable.
    """
    for logger in trainer.loggers:
        folder = logger.save_dir
        if folder is None or "://" in str(folder):
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"trainer.logger.save_dir: {folder} cannot be written to: {error.strerror}") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"trainer.logger.save_dir: {folder} cannot be written to")
