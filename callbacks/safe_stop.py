"""Saves a run on Ctrl-C, and on SIGTERM, which SLURM sends before it ends a job."""

from __future__ import annotations

import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from rlrt_lightning.runtime.checkpoints import WholeCheckpointIO, check_writable
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.files import PART, remove
from rlrt_lightning.runtime.private.lightning import saves_within_epochs
from rlrt_lightning.runtime.run_files import CHECKPOINTS, keep_folder, run_folder
from rlrt_lightning.runtime.stopping import Stop
from rlrt_lightning.runtime.terminal import say

from .evaluation import Evaluation
from .parts import callbacks_of, data_of
from .run_checkpoint import adopt

RESUME = "resume with --ckpt_path last"


class SafeStop(Callback):
    """Saves a run that receives SIGTERM or SIGINT (Ctrl-C), and makes checkpoint writes atomic.

    Rollouts, scoring and evaluations are aborted immediately (with several ranks: at the end of the phase) and repeated
    when the run is resumed. During the updates, the current optimizer step is completed, and the checkpoint also holds
    the epoch's remaining micro-batches, so that the resumed run continues with the next step.

    Under SLURM with automatic requeueing, Lightning's checkpoint and requeue request happen at the same points.
    """

    def __init__(self) -> None:
        self._saved = 0  # optimizer steps in the newest checkpoint

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepares for signals, and checks that checkpoints can be written and resumed exactly."""
        data_of(trainer).stop_signal.begin()
        adopt(trainer.callbacks)  # type: ignore[attr-defined]
        folder = run_folder(trainer)
        if stage != "fit":
            return
        strategy: Any = trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:  # not a user's own
            strategy.checkpoint_io = WholeCheckpointIO()
        for callback in _checkpoints(trainer):
            if callback.dirpath is None and "://" not in str(getattr(trainer.logger, "save_dir", "")):
                callback.dirpath = str(folder / CHECKPOINTS)
            for name, value in saves_within_epochs(callback).items():
                if value:
                    raise ConfigError(
                        f"checkpoint.{name} saves where a run cannot be resumed exactly; set checkpoint.every_n_epochs "
                        "(SIGTERM also saves in the middle of an epoch)"
                    )
            if trainer.is_global_zero and "://" not in str(callback.dirpath):
                check_writable(Path(callback.dirpath or folder))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the run's folder from now on, and installs the signal handlers in a run that was resumed within an
        epoch, where no phase comes first."""
        keep_folder(trainer)
        data_of(trainer).stop_signal.listen(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Records the saved step."""
        self._saved = trainer.global_step

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Records the saved step, and removes partial checkpoints that the resumed run was writing when killed."""
        self._saved = checkpoint["global_step"]
        if trainer.is_global_zero and trainer.state.fn == "fit" and trainer.ckpt_path:
            for part in Path(trainer.ckpt_path).parent.glob(f"*.ckpt{PART}"):
                remove(part)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves a run that ends on a signal. A second Ctrl-C, and one during the start, ends it without saving."""
        if isinstance(exception, KeyboardInterrupt):
            number: int | None = signal.SIGINT
            outcome = (
                "nothing was trained yet" if not self._saved else f"{self._saved} optimizer steps are saved; {RESUME}"
            )
        elif isinstance(exception, Stop):
            number = trainer.strategy.broadcast(data_of(trainer).stop_signal.number)
            fitting = trainer.state.fn == "fit"
            outcome = self._save(trainer) if fitting else _resume_evaluation(trainer)
        else:
            return
        name = signal.Signals(number).name if number else "a signal to another rank"
        if trainer.is_global_zero:
            say(f"stopped by {name}: {outcome}", file=sys.stderr)

    def _save(self, trainer: Trainer) -> str:
        """Saves the run if it has unsaved steps, and returns a message about the outcome."""
        step = trainer.global_step
        if trainer.validating:
            # The validation is repeated on resume; Lightning would take one without any batch as finished.
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()
            progress.increment_ready()
            progress.increment_started()
        stop = data_of(trainer).stop_signal
        if trainer.strategy.broadcast(stop.requeue_asked) and stop.requeue is not None:
            stop.requeue()
            return f"saved after {step} optimizer steps, and asked SLURM to requeue the job"
        if step == self._saved:
            return f"all {step} optimizer steps are saved; {RESUME}" if step else "nothing was trained yet"
        callbacks = _checkpoints(trainer)
        if not callbacks or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return f"{step} optimizer steps are not saved, because checkpoints are disabled"
        path = callbacks[0].last_model_path or trainer.strategy.broadcast(_free_path(Path(callbacks[0].dirpath or "")))
        callbacks[0].last_model_path = path  # part of the saved state, so that the resumed run replaces this file
        trainer.save_checkpoint(path, weights_only=False)
        return f"saved after {step} optimizer steps as {path}; {RESUME}"


def _checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _resume_evaluation(trainer: Trainer) -> str:
    """How to resume an evaluation."""
    folder = next((evaluation.folder for evaluation in callbacks_of(trainer, Evaluation)), None)
    return "nothing was evaluated yet" if folder is None else f"resume with --evaluation.results={folder}"


def _free_path(folder: Path) -> str:
    """An unused path for last.ckpt, named as Lightning would name it."""
    names = (f"last-v{n}.ckpt" if n else "last.ckpt" for n in count())
    return str(next(folder / name for name in names if not (folder / name).exists()))
