"""What becomes of an exception: one line where settings are to blame, and a traceback where code is."""

from __future__ import annotations

import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException

from rlrt_lightning.runtime.checkpoints import disk_error
from rlrt_lightning.runtime.credentials import masked
from rlrt_lightning.runtime.errors import ConfigError

EXTRAS = {"vllm": "vllm", "reasoning_gym": "reasoning-gym", "peft": "lora", "gguf": "gguf"}
"""Packages that come with an extra of ours, by module."""

PARTS = {
    "callbacks": "trainer.callbacks",
    "loggers": "trainer.logger",
    "strategies": "trainer.strategy",
    "profilers": "trainer.profiler",
}
"""Settings by the folder of Lightning that holds what they name."""

REFUSALS = (ValueError, TypeError, ImportError, OSError, MisconfigurationException)
"""What a constructor raises that refuses its arguments; anything else is a fault in its code."""


def run(command: Callable[[], Any]) -> int:
    """Runs a command; what the user can mend becomes one line on stderr and exit code 2, Ctrl-C exit code 130.

    Args:
        command: May raise anything. What is no fault of settings or inputs keeps its traceback.
    """
    try:
        command()
    except Exception as error:
        line = told(error)
        if line is None:
            raise
        print(f"error: {masked(' '.join(line.split()))}", file=sys.stderr)
        return 2
    except SystemExit as end:
        # Lightning stops gracefully at a Ctrl-C, and then ends with 1 as if something had failed.
        if isinstance(end.__context__, KeyboardInterrupt):
            return 130
        raise
    except KeyboardInterrupt:
        return 130
    return 0


def told(error: BaseException) -> str | None:
    """What to say of an error that the user can mend; None where it has to keep its traceback.

    Besides our own these are a full or forbidden disk, a package that is not installed, and what Lightning raises on
    purpose: its trainer and callbacks check their settings and those of the loggers only when the run starts.
    """
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, OSError) and disk_error(error) is not None:
        return f"{error.filename or 'a file'} cannot be written or read: {error.strerror}"
    if isinstance(error, ImportError):
        wrong = with_install(error)
        return f"{_part(error)}: {wrong}" if _deliberate(error) else wrong if _missing(error) else None
    if isinstance(error, MisconfigurationException) or _deliberate(error):
        return f"{_part(error)}: {error}"
    return None


def _part(error: BaseException) -> str:
    """The setting by which the part of Lightning was chosen that raised an error, or the trainer's that it mentions."""
    file = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if file.stem == "model_checkpoint":
        return "checkpoint"
    mentioned = _mentioned(inspect.signature(Trainer).parameters, str(error))
    return PARTS.get(file.parent.name) or (f"trainer.{mentioned}" if mentioned else "trainer")


def _mentioned(names: Iterable[str], text: str) -> str | None:
    """The name that a text mentions first."""
    places = {name: found.start() for name in names if (found := re.search(rf"(?<![\w.]){name}(?!\w)", text))}
    return min(places, key=places.__getitem__) if places else None


def _deliberate(error: BaseException) -> bool:
    """Whether a `raise` in Lightning's own code made it, rather than a fault in what Lightning has called."""
    at = traceback.extract_tb(error.__traceback__)[-1:]
    return (
        type(error) in (ValueError, TypeError, RuntimeError, ImportError, ModuleNotFoundError)
        and bool(at)
        and "/lightning/" in Path(at[0].filename).as_posix()
        and (at[0].line or "").startswith("raise ")
    )


def with_install(error: ImportError) -> str:
    """What an import error says, and the command that installs what is missing."""
    text = str(error)
    missing = _missing(error)
    if missing in EXTRAS:
        return f"{text}; pip install 'rlrt-lightning[{EXTRAS[missing]}]'"
    return f"{text}; pip install {missing}" if missing and "pip install" not in text else text


def _missing(error: ImportError) -> str | None:
    """The package that is not installed, as far as an import error names one."""
    named = re.findall(r"`(\w+)`", str(error))
    for name in [error.name.partition(".")[0]] if error.name else named:
        with suppress(ValueError, ImportError):
            if name.islower() and find_spec(name) is None:
                return name
    return None


def of_constructor(
    error: Exception, setting: str, make: Callable[..., Any], settings: Mapping[str, Any]
) -> ConfigError | None:
    """A constructor's refusal as an error that names the setting.

    Args:
        error: What the constructor raised.
        setting: Name of the setting that is the class.
        make: Calls the constructor.
        settings: What it was called with.

    Returns:
        The error, or None where the constructor itself is at fault: a TypeError in code of the user's own, or an error
        by which nobody refuses an argument.
    """
    if not isinstance(error, REFUSALS) or (isinstance(error, TypeError) and _in_users_code(error)):
        return None
    text = with_install(error) if isinstance(error, ImportError) else str(error)
    if isinstance(error, ConfigError) and re.match(r"(data|model|trainer|checkpoint)\b", text):
        return error
    culprit = _mentioned(settings, text) or _culprit(make, settings)
    return ConfigError(f"{setting}.{culprit}: {text}" if culprit else f"{setting}: {text}")


def _culprit(make: Callable[..., Any], settings: Mapping[str, Any]) -> str | None:
    """The setting without which the constructor takes the others."""
    for name in settings:
        with suppress(Exception):
            make(**{k: list(v) if isinstance(v, list) else v for k, v in settings.items() if k != name})
            return name
    return None


def place_of(made: type, arguments: Mapping[str, Any], config: Any, name: str = "") -> str | None:
    """The name of the setting that a class is made for.

    Args:
        made: The class.
        arguments: What its constructor is called with.
        config: Settings by name, nested.
        name: What they are the settings of.
    """
    if isinstance(config, (list, tuple)):
        return next((at for part in config if (at := place_of(made, arguments, part, name))), None)
    if not isinstance(config, (dict, Namespace)):
        return None
    parts = config if isinstance(config, dict) else vars(config)
    path = parts.get("class_path", made.__name__)
    own = parts.get("init_args", {}) if "class_path" in parts else parts
    own = own if isinstance(own, dict) else vars(own)
    plain = {k: v for k, v in arguments.items() if v is None or isinstance(v, (bool, int, float, str))}
    same = set(own) == set(arguments) and all(
        str(own[k]) == str(v) for k, v in plain.items()
    )  # NaN is not equal to NaN
    if same and path.rpartition(".")[2] == made.__name__:
        return name
    inside = ((f"{name}.{key}" if name else key, part) for key, part in own.items())
    return next((at for inner, part in inside if (at := place_of(made, arguments, part, inner))), None)


def _in_users_code(error: Exception) -> bool:
    """Whether it was raised in code that is neither ours nor that of an installed package."""
    frame = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    file, paths = Path(frame.f_code.co_filename).resolve(), sysconfig.get_paths()
    installed = [Path(paths[kind]).resolve() for kind in ("stdlib", "purelib", "platlib")]
    ours = frame.f_globals.get("__name__", "").startswith("rlrt_lightning.")
    return not (ours or any(file.is_relative_to(folder) for folder in installed))
