"""What Lightning offers and a run here cannot take, said before anything is drawn."""

from __future__ import annotations

import difflib
import logging
import math
import re
from typing import Any

from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.trainer_limits import check_limits

log = logging.getLogger(__name__)

TRAINER: dict[str, tuple[float, float]] = {
    # Each epoch trains on rollouts of its own.
    "reload_dataloaders_every_n_epochs": (0, 1),
    # Lightning's sanity check over all of the validation is our measurement before training.
    "num_sanity_val_steps": (2, math.inf),
    "log_every_n_steps": (50, 1),
}
"""Attributes of the trainer: Lightning's default, and ours. The loops read them after the data module's `setup`."""

RELOAD = "trainer.reload_dataloaders_every_n_epochs has to be 1: each epoch trains on rollouts of its own"

NAMESPACES = ("eval", "faults", "groups", "labels", "rollout", "signal", "speed", "time", "train")
"""What our tags begin with."""

REFUSED = {
    "GradientAccumulationScheduler": "an epoch is cut into micro-batches before it begins: set "
    "trainer.accumulate_grad_batches",
    "StochasticWeightAveraging": "it takes the average before there are weights, and the learning rate away from "
    "model.optimizer: take EMAWeightAveraging",
    "LearningRateFinder": "it trains on batches that are not the run's: set model.optimizer.lr",
    "BatchSizeFinder": "there is no batch size: set trainer.accumulate_grad_batches and data.engine.max_rows",
    "ModelPruning": "engines and teachers would not see the pruned weights",
    "BackboneFinetuning": "the policy has no backbone: train adapters by model.policy.lora",
    "OnExceptionCheckpoint": "it saves where a run cannot be resumed exactly: set checkpoint.every_n_epochs (SIGTERM "
    "saves in the middle of an epoch too)",
}
"""Callbacks of Lightning that cannot work here, and what to do."""


def set_up_trainer(trainer: Any, data: Any) -> None:
    """Puts our defaults in the place of Lightning's, where a script left these as they are, and checks them."""
    changed = []
    for name, (theirs, ours) in TRAINER.items():
        if getattr(trainer, name) == theirs:
            setattr(trainer, name, ours)
            changed.append(f"{name}={-1 if ours == math.inf else ours}")
    if changed:
        rank_zero_info("trainer: %s, in place of Lightning's defaults", ", ".join(changed))
    check_trainer(trainer, data)
    check_limits(trainer)
    steps = data.minibatches * trainer.accumulate_grad_batches
    interval = trainer.val_check_interval
    if isinstance(interval, int) and interval > steps and trainer.check_val_every_n_epoch is not None:
        raise ConfigError(
            f"trainer.val_check_interval is {interval}; an epoch has {steps} batches, data.minibatches times "
            "trainer.accumulate_grad_batches"
        )
    if trainer.reload_dataloaders_every_n_epochs != 1:
        raise ConfigError(RELOAD)
    if data.prompts_per_epoch % (data.minibatches * trainer.world_size):
        raise ConfigError(
            f"data.prompts_per_epoch ({data.prompts_per_epoch}) has to be a multiple of data.minibatches "
            f"({data.minibatches}) times the number of ranks ({trainer.world_size})"
        )


def check_trainer(trainer: Any, data: Any) -> None:
    """Refuses what would train otherwise than it says.

    Args:
        trainer: The trainer, about to fit.
        data: The data module.

    Raises:
        ConfigError: Naming the setting.
    """
    for callback in list(trainer.callbacks):
        for name, reason in REFUSED.items():
            if isinstance(callback, getattr(of_lightning, name)):
                trainer.callbacks.remove(callback)  # one that acts on exceptions would act on this one
                raise ConfigError(f"trainer.callbacks: {type(callback).__name__} cannot be used: {reason}")
    if trainer.overfit_batches:
        raise ConfigError(
            f"trainer.overfit_batches is {trainer.overfit_batches}, but every epoch has rollouts of its own: give "
            "data.task few problems instead"
        )
    limit = trainer.limit_train_batches
    if (limit != 1 or isinstance(limit, int)) and not trainer.fast_dev_run:  # 1 is one batch, and 1.0 all
        raise ConfigError(
            f"trainer.limit_train_batches is {limit}, which would leave out a part of each "
            "epoch's rollouts: set data.prompts_per_epoch, or limit_train_batches to null"
        )
    if trainer.max_steps > 0 and trainer.max_steps % data.minibatches and not trainer.fast_dev_run:
        raise ConfigError(
            f"trainer.max_steps is {trainer.max_steps}, which ends within an epoch: take a multiple of "
            f"data.minibatches ({data.minibatches}), or set trainer.max_epochs"
        )
    for callback in trainer.callbacks:
        if isinstance(callback, (ModelCheckpoint, EarlyStopping)) and callback.monitor:
            _check_monitor(callback, trainer, data)


def _check_monitor(callback: Any, trainer: Any, data: Any) -> None:
    """Refuses a tag that is certain not to be logged; of others, the first epoch shows it."""
    tag = callback.monitor
    saves = isinstance(callback, ModelCheckpoint)
    where = "checkpoint.monitor" if saves else f"{type(callback).__name__}.monitor"
    if tag.startswith("eval/"):
        if not _is_logged(tag, trainer, data):
            raise ConfigError(f"{where} is {tag}, which is not logged{_meant(tag, _scores(data))}")
        if wrong := _never_measured(trainer, data, saves):
            raise ConfigError(f"{where} is {tag}, but {wrong}")
    elif tag.split("/")[0] not in NAMESPACES:
        if _all_known(trainer):
            raise ConfigError(f"{where} is {tag}, which is not logged{_meant(tag, _scores(data))}")
    elif saves:
        log.warning(
            "%s is %s, measured before or while the saved weights were trained in their last epoch; %s is of the saved "
            "weights themselves",
            where,
            tag,
            (_scores(data) or ["eval/..."])[0],
        )


def _scores(data: Any) -> list[str]:
    return [f"eval/{name}/{kind}@{spec.samples}" for name, spec in data.benchmarks.items() for kind in ("avg", "pass")]


def _is_logged(tag: str, trainer: Any, data: Any) -> bool:
    """Whether an evaluation logs a tag, as far as can be told before one."""
    _, name, kind = [*tag.split("/", 2), "", ""][:3]
    if name not in data.benchmarks or not kind:
        return False
    score = re.match(r"(avg|pass)@(\d+)", kind)
    if score is None:
        return True
    samples = [data.benchmarks[name].samples]
    ks = next((c.ks for c in trainer.callbacks if type(c).__name__ == "Evaluation"), None)
    return int(score[2]) in (ks or samples if score[1] == "pass" else samples)


def _never_measured(trainer: Any, data: Any, saves: bool) -> str | None:
    """Why no evaluation comes where the tag is wanted: in the run, or, to save by, at the end of an epoch."""
    every, most = trainer.check_val_every_n_epoch, trainer.max_epochs
    if not trainer.limit_val_batches:
        return "trainer.limit_val_batches is 0: nothing is evaluated"
    if every and most and 0 < most < every:
        return f"trainer.check_val_every_n_epoch ({every}) is above trainer.max_epochs ({most}): nothing is evaluated"
    batches, interval = data.minibatches * trainer.accumulate_grad_batches, trainer.val_check_interval
    steps = max(1, int(batches * interval)) if isinstance(interval, float) else interval
    if saves and not (isinstance(steps, int) and (batches % steps == 0 or steps % batches == 0)):
        return "trainer.val_check_interval evaluates within epochs, and their ends are saved: set it to 1.0"
    return None


def _all_known(trainer: Any) -> bool:
    """Whether nobody but Lightning and we can log anything."""
    whole = [trainer.lightning_module, *trainer.callbacks]
    return all(type(part).__module__.split(".")[0] in ("lightning", "rlrt_lightning") for part in whole)


def check_logged(callback: ModelCheckpoint, logged: list[str]) -> None:
    """Refuses a tag that the first epoch did not log.

    Args:
        callback: Who monitors it.
        logged: The tags that were logged.

    Raises:
        ConfigError: If it is not among them.
    """
    tag = callback.monitor
    if tag and not tag.startswith("eval/") and tag not in logged:
        raise ConfigError(f"checkpoint.monitor is {tag}, which is not logged{_meant(tag, logged)}")


def _meant(tag: str, known: list[str]) -> str:
    close = difflib.get_close_matches(tag, known, n=1) or known[:1]
    return f" (did you mean {close[0]}?)" if close else ""
