"""What a run does when SIGTERM asks it to end, as SLURM does before it takes the machine away."""

from __future__ import annotations

import signal
import sys
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from rlrt_lightning.runtime.checkpoints import WholeCheckpointIO, check_writable
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.files import PART, remove
from rlrt_lightning.runtime.private.lightning import saves_within_epochs
from rlrt_lightning.runtime.run_files import run_folder
from rlrt_lightning.runtime.stopping import Stop

from .run_checkpoint import adopt

if TYPE_CHECKING:
    from rlrt_lightning.datamodule import RolloutDataModule

RESUME = "go on with --ckpt_path last"


class SafeStop(Callback):
    """Saves a run that is asked to end by SIGTERM, and sees to it that checkpoints are never half there.

    Rollouts, scoring and evaluations are given up at once (with several ranks: at the end of the phase) and made
    again when the run is resumed. In the middle of the updates the next optimizer step is finished, and the checkpoint
    also holds what is left of the epoch's micro-batches, so that the resumed run goes on with the step after it.

    Under SLURM with automatic requeueing, Lightning's checkpoint and request to requeue come at the same moments.
    """

    def __init__(self) -> None:
        self._saved = 0  # optimizer steps that are in the newest checkpoint

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listens, and checks that checkpoints can be written and resumed exactly."""
        _data(trainer).stop_signal.begin()
        adopt(trainer.callbacks)  # type: ignore[attr-defined]
        folder = run_folder(trainer)
        if stage != "fit":
            return
        strategy: Any = trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:  # none of the user's own
            strategy.checkpoint_io = WholeCheckpointIO()
        for callback in _checkpoints(trainer):
            if callback.dirpath is None and trainer.logger is None:
                callback.dirpath = str(folder / "checkpoints")
            for name, value in saves_within_epochs(callback).items():
                if value:
                    raise ConfigError(
                        f"checkpoint.{name} saves where a run cannot be resumed exactly; set checkpoint.every_n_epochs "
                        "(SIGTERM saves in the middle of an epoch too)"
                    )
            if trainer.is_global_zero and "://" not in str(callback.dirpath):
                check_writable(Path(callback.dirpath or folder))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens also where the run was resumed in the middle of an epoch, so that no phase of one comes first."""
        _data(trainer).stop_signal.listen(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Knows what is saved."""
        self._saved = trainer.global_step

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Knows what is saved; clears away what the run that is resumed was writing when it was killed."""
        self._saved = checkpoint["global_step"]
        if trainer.is_global_zero and trainer.state.fn == "fit" and trainer.ckpt_path:
            for part in Path(trainer.ckpt_path).parent.glob(f"*.ckpt{PART}"):
                remove(part)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves a run that ends because it was asked to."""
        if not isinstance(exception, Stop):
            return
        number = trainer.strategy.broadcast(_data(trainer).stop_signal.number)
        name = signal.Signals(number).name if number else "a signal to another rank"
        said = self._save(trainer) if trainer.state.fn == "fit" else "evaluations go on where evaluation.results is set"
        if trainer.is_global_zero:
            print(f"stopped by {name}: {said}", file=sys.stderr, flush=True)

    def _save(self, trainer: Trainer) -> str:
        """Saves what is not saved yet, and says what there is."""
        step = trainer.global_step
        if trainer.validating:
            # It begins anew, and Lightning takes one that no batch was seen of for finished.
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            progress.reset()
            progress.increment_ready()
            progress.increment_started()
        stop = _data(trainer).stop_signal
        if trainer.strategy.broadcast(stop.requeue_asked) and stop.requeue is not None:
            stop.requeue()
            return f"saved after {step} optimizer steps, and asked SLURM to start the job again"
        if step == self._saved:
            return f"all {step} optimizer steps are saved; {RESUME}" if step else "nothing was trained yet"
        callbacks = _checkpoints(trainer)
        if not callbacks or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return f"nothing is saved of {step} optimizer steps, as checkpoints are turned off"
        path = callbacks[0].last_model_path or trainer.strategy.broadcast(_free(Path(callbacks[0].dirpath or "")))
        trainer.save_checkpoint(path, weights_only=False)
        return f"saved after {step} optimizer steps as {path}; {RESUME}"


def _checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _free(folder: Path) -> str:
    """A name for last.ckpt that no other run has taken, as Lightning would choose it."""
    names = (f"last-v{n}.ckpt" if n else "last.ckpt" for n in count())
    return str(next(folder / name for name in names if not (folder / name).exists()))


def _data(trainer: Trainer) -> RolloutDataModule:
    return cast("RolloutDataModule", cast(Any, trainer).datamodule)
