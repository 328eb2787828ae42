"""Refuses Lightning features and trainer settings that do not work here, before any rollout is drawn."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from rlrt_lightning.runtime.errors import ConfigError, did_you_mean
from rlrt_lightning.runtime.trainer_limits import check_limits

log = logging.getLogger(__name__)

REPLACED_DEFAULTS: dict[str, tuple[float, float]] = {
    # Each epoch trains on new rollouts.
    "reload_dataloaders_every_n_epochs": (0, 1),
    # Lightning's sanity check, over the whole validation set, is the evaluation before training.
    "num_sanity_val_steps": (2, math.inf),
    "log_every_n_steps": (50, 1),
}
"""Attributes of the trainer: Lightning's default and ours. The loops read them after the data module's `setup`."""

RELOAD = "trainer.reload_dataloaders_every_n_epochs has to be 1, because each epoch trains on new rollouts"

TAG_PREFIXES = ("eval", "faults", "groups", "labels", "rewards", "rollout", "signal", "speed", "time", "train")
"""First parts of the tags that we log."""

RISING = re.compile(r"eval/.+/(avg|pass)@.+|rollout/(reward|shaped_reward|correct)|rewards/.+|groups/all_correct")
"""Tags of which a higher value is better. Lightning's default, `mode: min`, would keep the worst checkpoint."""

OF_EVALUATION = re.compile(r"(avg|pass)@(\d+)(_low|_high)?|length|truncated|labels/.+")
"""Tags of an evaluation, without the prefix `eval/<benchmark>/`."""

REFUSED = {
    "GradientAccumulationScheduler": "an epoch is split into micro-batches before it starts; set "
    "trainer.accumulate_grad_batches",
    "StochasticWeightAveraging": "it copies the module before the weights are loaded and overrides the learning rate "
    "of model.optimizer; use EMAWeightAveraging",
    "LearningRateFinder": "it trains on batches that are not part of the run; set model.optimizer.lr",
    "BatchSizeFinder": "there is no batch size; set trainer.accumulate_grad_batches and data.engine.max_rows",
    "ModelPruning": "engines and teachers would not see the pruned weights",
    "BackboneFinetuning": "the policy has no backbone; train adapters with model.policy.lora",
    "OnExceptionCheckpoint": "it saves where a run cannot be resumed exactly; set checkpoint.every_n_epochs (SIGTERM "
    "also saves in the middle of an epoch)",
}
"""Lightning callbacks that do not work here, with the reason and the alternative."""


def set_up_trainer(trainer: Any, data: Any) -> None:
    """Replaces trainer settings that a script left at Lightning's defaults by ours, and checks all settings."""
    changed = []
    for name, (theirs, ours) in REPLACED_DEFAULTS.items():
        if getattr(trainer, name) == theirs:
            setattr(trainer, name, ours)
            changed.append(f"{name}={-1 if ours == math.inf else ours}")
    if changed:
        rank_zero_info("trainer: using %s instead of Lightning's defaults", ", ".join(changed))
    check_trainer(trainer, data)
    check_limits(trainer)
    steps = data.minibatches * trainer.accumulate_grad_batches
    interval = trainer.val_check_interval
    if isinstance(interval, int) and interval > steps and trainer.check_val_every_n_epoch is not None:
        raise ConfigError(
            f"trainer.val_check_interval is {interval}; it has to be at most {steps}, the batches of an epoch "
            "(data.minibatches times trainer.accumulate_grad_batches)"
        )
    if trainer.reload_dataloaders_every_n_epochs != 1:
        raise ConfigError(RELOAD)
    if data.prompts_per_epoch % (data.minibatches * trainer.world_size):
        raise ConfigError(
            f"data.prompts_per_epoch ({data.prompts_per_epoch}) has to be a multiple of data.minibatches "
            f"({data.minibatches}) times the number of ranks ({trainer.world_size})"
        )


def check_trainer(trainer: Any, data: Any) -> None:
    """Refuses settings and callbacks that would not train as configured.

    Args:
        trainer: The trainer, about to fit.
        data: The data module.

    Raises:
        ConfigError: If one is set.
    """
    for callback in list(trainer.callbacks):
        for name, reason in REFUSED.items():
            if isinstance(callback, getattr(lightning_callbacks, name)):
                trainer.callbacks.remove(callback)  # a callback that handles exceptions would handle this one
                raise ConfigError(f"trainer.callbacks: {type(callback).__name__} cannot be used: {reason}")
    if trainer.overfit_batches:
        raise ConfigError(
            f"trainer.overfit_batches is {trainer.overfit_batches}, but each epoch has new rollouts; give data.task a "
            "few problems instead"
        )
    limit = trainer.limit_train_batches
    if (limit != 1 or isinstance(limit, int)) and not trainer.fast_dev_run:  # 1 is one batch, 1.0 is all
        raise ConfigError(
            f"trainer.limit_train_batches is {limit}, which would drop part of each epoch's rollouts; set "
            "data.prompts_per_epoch instead, and limit_train_batches to null"
        )
    if trainer.max_steps > 0 and trainer.max_steps % data.minibatches and not trainer.fast_dev_run:
        raise ConfigError(
            f"trainer.max_steps is {trainer.max_steps}, which ends within an epoch; set it to a multiple of "
            f"data.minibatches ({data.minibatches}), or set trainer.max_epochs"
        )
    for callback in trainer.callbacks:
        if isinstance(callback, (ModelCheckpoint, EarlyStopping)) and callback.monitor:
            _check_monitor(callback, trainer, data)


def _check_monitor(callback: Any, trainer: Any, data: Any) -> None:
    """Refuses a tag that is known not to be logged, and a score of which the lowest value would count as the best.
    `check_logged` checks the other tags after the first epoch."""
    tag = callback.monitor
    saves = isinstance(callback, ModelCheckpoint)
    owner = "checkpoint" if saves else type(callback).__name__
    where, ours = f"{owner}.monitor", tag.split("/")[0] in TAG_PREFIXES
    if tag.startswith("eval/"):
        if not _is_logged(tag, trainer, data):
            others = [f"eval/{name}/{kind}" for name in data.benchmarks for kind in ("length", "truncated")]
            raise _not_logged(where, tag, [*_scores(data), *others])
        if wrong := _never_evaluated(trainer, data, saves):
            raise ConfigError(f"{where} is {tag}, but {wrong}")
    elif tag.startswith("teacher/"):
        raise ConfigError(
            f"{where} is {tag}, which measures the teacher instead of the policy; set it to "
            f"{(_scores(data) or ['rollout/reward'])[0]}"
        )
    elif not ours and _only_known_classes(trainer):
        raise _not_logged(where, tag, _scores(data))
    if callback.mode == "min" and RISING.fullmatch(tag):
        effect = "keeps the checkpoints with its lowest values" if saves else "stops the run unless it falls"
        flag = "--checkpoint.mode=max" if saves else f"{owner}.mode to max"
        raise ConfigError(f"{where} is {tag}, but {owner}.mode is min, which {effect}; set {flag}")
    if saves and ours and not tag.startswith("eval/"):
        log.warning(
            "%s is %s, which is measured before or during the last epoch of the saved weights; %s is measured on the "
            "saved weights themselves",
            where,
            tag,
            (_scores(data) or ["eval/..."])[0],
        )


def _scores(data: Any) -> list[str]:
    return [f"eval/{name}/{kind}@{spec.samples}" for name, spec in data.benchmarks.items() for kind in ("avg", "pass")]


def _is_logged(tag: str, trainer: Any, data: Any) -> bool:
    """Whether an evaluation logs a tag, as far as is known before the run."""
    _, name, kind = [*tag.split("/", 2), "", ""][:3]
    if name not in data.benchmarks or not kind:
        return False
    known = OF_EVALUATION.fullmatch(kind)
    if known is None:
        return not _only_known_classes(trainer)
    if known[1] is None:
        return True
    samples = [data.benchmarks[name].samples]
    ks = next((c.ks for c in trainer.callbacks if type(c).__name__ == "Evaluation"), None)
    return int(known[2]) in (ks or samples if known[1] == "pass" else samples)


def _never_evaluated(trainer: Any, data: Any, saves: bool) -> str | None:
    """Why no evaluation takes place in the run or, if checkpoints depend on it, at the ends of epochs; None if one
    does."""
    every, most = trainer.check_val_every_n_epoch, trainer.max_epochs
    if not trainer.limit_val_batches:
        return "trainer.limit_val_batches is 0: nothing is evaluated"
    if every and most and 0 < most < every:
        return f"trainer.check_val_every_n_epoch ({every}) is above trainer.max_epochs ({most}): nothing is evaluated"
    batches, interval = data.minibatches * trainer.accumulate_grad_batches, trainer.val_check_interval
    steps = max(1, int(batches * interval)) if isinstance(interval, float) else interval
    if saves and not (isinstance(steps, int) and (batches % steps == 0 or steps % batches == 0)):
        return "trainer.val_check_interval evaluates within epochs, but checkpoints are saved at the end; set it to 1.0"
    return None


def _only_known_classes(trainer: Any) -> bool:
    """Whether only classes of Lightning and of this package can log metrics."""
    parts = [trainer.lightning_module, *trainer.callbacks]
    return all(type(part).__module__.split(".")[0] in ("lightning", "rlrt_lightning") for part in parts)


def check_logged(callback: ModelCheckpoint, logged: list[str]) -> None:
    """Refuses a tag that the first epoch did not log.

    Args:
        callback: The callback that monitors the tag.
        logged: The tags that were logged.

    Raises:
        ConfigError: If the tag is not among them.
    """
    tag = callback.monitor
    if tag and not tag.startswith("eval/") and tag not in logged:
        raise _not_logged("checkpoint.monitor", tag, logged)


def _not_logged(where: str, tag: str, logged: list[str]) -> ConfigError:
    return ConfigError(f"{where} is {tag}, which is not logged{did_you_mean(tag, logged, default=logged)}")
