"""The settings saved in checkpoints, and the changes that a resumed run may make to them."""

from __future__ import annotations

import inspect
import logging
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from rlrt_lightning.objective import TeacherWeights
from rlrt_lightning.policy.model import EMBEDDED
from rlrt_lightning.runtime.checkpoints import problem
from rlrt_lightning.runtime.errors import ConfigError, did_you_mean
from rlrt_lightning.runtime.optimizers import probe
from rlrt_lightning.runtime.tensorboard import logger_names

if TYPE_CHECKING:
    from rlrt_lightning.tasks import Problem

log = logging.getLogger(__name__)

KEY = "rlrt_lightning"
"""Key of the record in a checkpoint."""

FORMAT = 1
"""Format number of the record and of our other checkpoint contents; increased by incompatible releases."""

FREE = (
    "trainer",
    "checkpoint",
    "model.optimizer",
    "model.warmup_steps",
    "model.policy.dither",
    "model.policy.attention",
    "model.policy.gradient_checkpointing",
    "model.policy.logits_chunk",
    "model.policy.score_tokens",
    "model.teacher.scored_by",
    "model.teacher.rest_on_cpu",
    "data.engine",
    "data.rescore",
    "data.ahead",
    "data.benchmarks",
    "data.eval_prompts",
    "data.tokens_per_pass",
    "data.verifier_workers",
    "data.verifier_timeout_s",
    "data.verifier_memory_gb",
    "data.max_fault_share",
)
"""Settings that a resumed run may always change, because they do not affect what is trained on."""

MODEL = ("model.policy.path", "model.policy.lora")
"""Settings that define the model; an evaluation compares only these."""

TEACHER = "teacher_refresh"
"""Settings of the teacher's weights; the method's defaults if the user has not set them."""

PROBLEMS, STATE = "data.task.problems", "model.optimizer.state"
"""Entries of the record that are not settings: a digest of the problems, and the optimizer's state keys per weight."""

OF_TRAINER = (
    "max_epochs",
    "min_epochs",
    "accumulate_grad_batches",
    "precision",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "num_devices",
    "num_nodes",
    "check_val_every_n_epoch",
    "val_check_interval",
    "limit_val_batches",
    "log_every_n_steps",
)
OF_CHECKPOINT = ("monitor", "mode", "save_top_k", "save_last", "save_weights_only", "every_n_epochs")

ALIASES = {"seed_everything": "data.seed"}
"""Settings with a different name on the command line."""

Settings = dict[str, Any]


class Changes(NamedTuple):
    """Descriptions of changed settings: those allowed by `model.allow_changes`, and those in `FREE`."""

    allowed: list[str]
    free: list[str]


# -- the record ----------------------------------------------------------------------------------------------------


def record(trainer: Trainer, module: Any) -> dict[str, Any]:
    """The record of a run that is saved in its checkpoints, as plain values."""
    data = getattr(trainer, "datamodule", None)
    return {"format": FORMAT, "settings": settings(trainer, module, data)}


def settings(trainer: Trainer, module: Any, data: Any) -> Settings:
    """The settings of a run by their names on the command line.

    Args:
        trainer: The trainer.
        module: The module; its weights need not be loaded.
        data: The data module; the digest of the problems is included once they have been read.
    """
    from rlrt_lightning.callbacks import TeacherRefresh

    found = of_object(module, "model", exclude=("allow_changes", "optimizer"))
    found |= _optimizer(module)
    path = str(module.policy.path)
    if path == str(EMBEDDED):
        found["model.policy.path"] = "embedded"
    elif Path(path).exists():
        found["model.policy.path"] = str(Path(path).resolve())
    if data is not None:
        found |= of_object(data, "data")
        if len(data.training_problems):
            found[PROBLEMS] = digest(data.training_problems)
    found |= {f"trainer.{name}": _plain(getattr(trainer, name, None)) for name in OF_TRAINER}
    found["trainer.strategy"] = type(trainer.strategy).__name__
    found["trainer.logger"] = logger_names(trainer.loggers)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, TeacherRefresh):
            found |= of_object(callback.schedule(module), TEACHER)
        elif isinstance(callback, ModelCheckpoint):
            found |= {f"checkpoint.{name}": getattr(callback, name) for name in OF_CHECKPOINT}
    return found


def of_object(value: Any, name: str, exclude: Sequence[str] = ()) -> Settings:
    """The settings of an object: its class as `name`, and its constructor's arguments as `name.<argument>`, as far as
    it has attributes with their names.

    Args:
        value: The object.
        name: Name of the setting.
        exclude: Parameters that are not recorded.
    """
    found: Settings = {name: _class_name(type(value))}
    try:
        parameters = list(inspect.signature(type(value)).parameters)
    except (ValueError, TypeError):  # some classes implemented in C
        return found
    for parameter in parameters:
        if parameter in exclude:
            continue
        inner = _attribute(value, parameter)
        if inner is inspect.Parameter.empty:
            continue
        plain = _plain(inner)
        if plain is not inspect.Parameter.empty:
            found[f"{name}.{parameter}"] = plain
        elif hasattr(inner, "__dict__"):
            found |= of_object(inner, f"{name}.{parameter}")
    return found


def _attribute(value: Any, parameter: str) -> Any:
    """An attribute, without evaluating properties; torch modules keep submodules separately."""
    attributes = {**vars(value), **(dict(value.named_children()) if isinstance(value, nn.Module) else {})}
    return attributes.get(parameter, attributes.get(f"_{parameter}", inspect.Parameter.empty))


def _plain(value: Any) -> Any:
    """A value as plain data for a checkpoint; `Parameter.empty` for other objects."""
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return value
    if inspect.isroutine(value):
        return _class_name(value)
    kinds: dict[type, Callable[[Any], Any]] = {int: int, float: float, str: str, Path: str}
    for kind, convert in kinds.items():  # subclasses, such as NumPy scalars, would be pickled as objects
        if isinstance(value, kind):
            return convert(value)
    items = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, (Mapping, list, tuple, set, frozenset)):
        return inspect.Parameter.empty
    plain = [_plain(item) for item in items]
    for i, item in enumerate(items):
        if plain[i] is inspect.Parameter.empty:  # such as evaluation sets, which have their own tasks
            plain[i] = of_object(item, "") if hasattr(item, "__dict__") else repr(item)
    return dict(zip(map(str, value), plain, strict=True)) if isinstance(value, Mapping) else plain


def _class_name(value: Any) -> str:
    """Qualified name of a class or function; for ours without the module, which may change between releases."""
    module = str(getattr(value, "__module__", ""))
    return value.__qualname__ if module.split(".")[0] == KEY else f"{module}.{value.__qualname__}"


def _optimizer(module: Any) -> Settings:
    found = probe(module.optimizer_factory)
    if found is None:
        return {}
    optimizer, state = found
    defaults = {f"model.optimizer.{name}": _plain(value) for name, value in optimizer.defaults.items()}
    known = {name: value for name, value in defaults.items() if value is not inspect.Parameter.empty}
    return {"model.optimizer": _class_name(type(optimizer)), STATE: state, **known}


def digest(problems: Sequence[Problem], samples: int = 100) -> str:
    """Describes a set of problems by their number and a digest of an evenly spaced sample."""
    hashed = blake2b(digest_size=8)
    for i in range(0, len(problems), max(1, len(problems) // samples)):
        p = problems[i]
        text = "\x1f".join(map(str, (p.id, p.prompt, p.answer, p.solution)))
        hashed.update(text.encode("utf-8", "replace") + b"\x1e")
    return f"{len(problems)} problems, digest {hashed.hexdigest()}"


def rebuilt(found: Settings, name: str) -> Any:
    """Builds an object from the settings recorded by `of_object`. Only our public classes are instantiated.

    Args:
        found: The record's settings.
        name: Name of the object's setting.

    Raises:
        ConfigError: If the object's class is not one of ours.
    """
    import rlrt_lightning

    class_name = found.get(name)
    if not isinstance(class_name, str) or class_name not in rlrt_lightning.__all__:
        raise ConfigError(
            f"{name} is {class_name} in the checkpoint, not a class of rlrt_lightning; pass it as an argument"
        )
    cls = getattr(rlrt_lightning, class_name)
    arguments: dict[str, Any] = {}
    for parameter in inspect.signature(cls).parameters:
        inner = f"{name}.{parameter}"
        if any(other.startswith(f"{inner}.") for other in found):
            arguments[parameter] = rebuilt(found, inner)
        elif inner in found:
            arguments[parameter] = found[inner]
    return cls(**arguments)


def parts_of(path: Path, given: set[str]) -> dict[str, Any]:
    """The arguments of a checkpoint's module.

    Args:
        path: The checkpoint.
        given: Names of arguments that the caller passes.

    Raises:
        ConfigError: If the checkpoint cannot be read, or does not contain an argument that is needed.
    """
    if not path.exists():
        raise ConfigError(f"there is no checkpoint at {path}")
    if path.is_dir():
        raise ConfigError(
            f"{path} is a sharded checkpoint; resume it with FSDP2Strategy(save_distributed_checkpoint=False), which "
            "saves a single file"
        )
    if wrong := problem(path, resume=False):
        raise ConfigError(f"{path} {wrong}")
    found = saved_settings(torch.load(path, map_location="cpu", weights_only=True, mmap=True), path)
    if found is None:
        if missing := {"policy", "teacher"} - given:
            raise ConfigError(f"{path} does not contain the settings of its run; pass {' and '.join(sorted(missing))}")
        return {}
    parts = ("policy", "teacher", "method")
    whole = {name: rebuilt(found, f"model.{name}") for name in parts if name not in given}
    names = {name: name.removeprefix("model.") for name in found if re.fullmatch(r"model\.\w+", name)}
    plain = {names[name]: found[name] for name in names if names[name] not in (*parts, "optimizer")}
    return {**plain, **whole}


def teacher_weights(checkpoint: Mapping[str, Any]) -> TeacherWeights | None:
    """The schedule of the teacher's weights in a checkpoint's run; None if the checkpoint does not contain it.

    Raises:
        ConfigError: If the checkpoint has a different format.
    """
    found = saved_settings(checkpoint, "the checkpoint")
    return rebuilt(found, TEACHER) if found is not None and TEACHER in found else None


# -- the comparison ------------------------------------------------------------------------------------------------


def saved_settings(checkpoint: Mapping[str, Any], path: str | Path) -> Settings | None:
    """The settings in a checkpoint; None for checkpoints of earlier releases, which have none.

    Raises:
        ConfigError: If the checkpoint has a different format.
    """
    found = checkpoint.get(KEY)
    if found is None:
        return None
    if not isinstance(found, Mapping) or found.get("format") != FORMAT:
        theirs = found.get("format") if isinstance(found, Mapping) else None
        raise ConfigError(
            f"ckpt_path: {path} has format {theirs} of rlrt_lightning's checkpoints, but this release reads format "
            f"{FORMAT}; use the release that saved it"
        )
    return dict(found["settings"])


def check(checkpoint: Mapping[str, Any], path: str | Path, now: Settings, allow: Sequence[str], fit: bool) -> Changes:
    """Compares the settings of a checkpoint's run with those of this run.

    Args:
        checkpoint: The checkpoint.
        path: Its path.
        now: `settings` of this run; settings that are not known yet are not compared.
        allow: `model.allow_changes`.
        fit: Whether training is resumed; an evaluation only requires the same model.

    Returns:
        The changed settings.

    Raises:
        ConfigError: If a setting has changed that may not change.
    """
    before = saved_settings(checkpoint, path)
    if before is None:
        if fit:
            log.warning("%s does not contain the settings of its run; make sure that they are the same", path)
        return Changes([], [])
    allowed = _known(allow, {**before, **now})
    changed = _changed(before, now)
    if not fit:
        changed = {name: text for name, text in changed.items() if _under(name, MODEL)}
    else:
        _check_optimizer(before, now, path)
    decisive = [name for name in changed if not _under(name, FREE)]
    if refused := [name for name in decisive if not _under(name, allowed)]:
        raise ConfigError(
            f"ckpt_path: {path} comes from a run with other settings: {'; '.join(changed[n] for n in refused)}; "
            f"restore them, or add --model.allow_changes=[{','.join([*allow, *refused])}]"
        )
    return Changes([changed[n] for n in decisive], [text for name, text in changed.items() if name not in decisive])


def check_file(path: Path, trainer: Trainer, module: Any, data: Any, fit: bool) -> None:
    """Runs `check` on a checkpoint file before models and data are loaded, with the settings known by then."""
    file = path / "meta.pt" if path.is_dir() else path
    checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if fit:
        check_end(trainer)
    if KEY in checkpoint:  # for others, `on_load_checkpoint` warns
        check(checkpoint, path, settings(trainer, module, data), module.allow_changes or [], fit)


def compare(trainer: Trainer, module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Runs `check` with all settings, and prints one line with the resumed checkpoint and the changed settings."""
    fit = trainer.state.fn == "fit"
    path, data = str(trainer.ckpt_path), getattr(trainer, "datamodule", None)
    if fit:
        check_end(trainer)
    changes = check(checkpoint, path, settings(trainer, module, data), module.allow_changes or [], fit)
    if not trainer.is_global_zero:
        return
    if changes.allowed:
        log.warning("settings changed since %s (model.allow_changes): %s", path, "; ".join(changes.allowed))
    if fit:
        what = f"{type(module.method).__name__}, epoch {checkpoint.get('epoch', -1) + 1}"
        since = f"; changed since: {'; '.join(changes.free)}" if changes.free else ""
        steps = checkpoint.get("global_step")
        print(f"resuming {path}: {what}, after {steps} optimizer steps{since}", file=sys.stderr, flush=True)


def check_end(trainer: Trainer) -> None:
    """Refuses to resume a run that ends after a number of steps: Lightning would mistake the end of an epoch for its
    middle.

    Raises:
        ConfigError: If `trainer.max_steps` is set.
    """
    if trainer.max_steps != -1:
        raise ConfigError(
            "trainer.max_steps: only runs whose end is given in epochs can be resumed; set trainer.max_epochs instead "
            "(an epoch has data.minibatches steps)"
        )


def _changed(before: Settings, now: Settings) -> dict[str, str]:
    """Descriptions of the differing settings, by name. For an object of a different class, only the class."""
    changed: dict[str, str] = {}
    for name in sorted(before.keys() & now.keys() - {STATE}):
        if _comparable(before[name]) != _comparable(now[name]) and not _under(name, list(changed)):
            changed[name] = f"{name} was {_shown(before[name])} and is {_shown(now[name])}"
    return changed


def _comparable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_optimizer(before: Settings, now: Settings, path: str | Path) -> None:
    name = "model.optimizer"
    if name not in before or name not in now:
        return
    if before[name] != now[name]:
        raise ConfigError(
            f"ckpt_path: {path} has the state of {name} {before[name]}, which {now[name]} cannot load; set "
            f"{name}={before[name]}"
        )
    if missing := sorted({*now[STATE]} - {*before[STATE]}):
        raise ConfigError(
            f"ckpt_path: {path} does not contain {', '.join(missing)}, which {name} needs with these settings; set "
            f"{name} as in the run that saved it"
        )


def _known(allow: Sequence[str], known: Settings) -> list[str]:
    """The names in `model.allow_changes`, with aliases replaced.

    Raises:
        ConfigError: If there is no setting with one of the names.
    """
    names = [ALIASES.get(name, name) for name in allow]
    for name in names:
        if not _under(name, known, reverse=True):
            hint = did_you_mean(name, list(known))
            raise ConfigError(f"model.allow_changes has {name}, which is not a setting of this run{hint}")
    return names


def _under(name: str, prefixes: Iterable[str], reverse: bool = False) -> bool:
    """Whether a name equals or is below one of the prefixes; with `reverse`, whether one of them equals or is below
    the name."""

    def below(a: str, b: str) -> bool:
        return a == b or a.startswith(f"{b}.")

    return any(below(prefix, name) if reverse else below(name, prefix) for prefix in prefixes)


def _shown(value: Any) -> str:
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return value if isinstance(value, str) and 0 < len(value) <= 80 else short.repr(value)
