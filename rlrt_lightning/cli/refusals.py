"""Turns an exception into a one-line error if a setting caused it; other exceptions keep their traceback."""

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
from rlrt_lightning.runtime.run_files import end_runs

EXTRAS = {"vllm": "vllm", "reasoning_gym": "reasoning-gym", "peft": "lora", "gguf": "gguf"}
"""Module name to the extra of this package that installs it."""

SETTINGS_BY_FOLDER = {
    "callbacks": "trainer.callbacks",
    "loggers": "trainer.logger",
    "strategies": "trainer.strategy",
    "profilers": "trainer.profiler",
}
"""Folder in Lightning's source to the setting that selects one of its classes."""

ARGUMENT_ERRORS = (ValueError, TypeError, ImportError, OSError, MisconfigurationException)
"""Exceptions by which a constructor rejects its arguments; any other is a bug in its code."""


def run(command: Callable[[], Any]) -> int:
    """Runs a command and returns its exit code: 2 with one line on stderr for an error that the user can fix, 130 for
    Ctrl-C before the run could be saved. A run that is saved first ends with `SystemExit`.

    Args:
        command: The command. Errors that settings or inputs do not explain are re-raised.
    """
    try:
        command()
    except Exception as error:
        line = user_message(error)
        if line is None:
            raise
        print(f"error: {masked(' '.join(line.split()))}", file=sys.stderr)
        return 2
    except SystemExit as end:
        # Lightning shuts down gracefully on Ctrl-C, but exits with 1.
        if isinstance(end.__context__, KeyboardInterrupt):
            return 130
        raise
    except KeyboardInterrupt:
        print("stopped by SIGINT: nothing was trained yet", file=sys.stderr)
        return 130
    finally:
        end_runs()
    return 0


def user_message(error: BaseException) -> str | None:
    """The message for an error that the user can fix; None for one that keeps its traceback.

    Besides our own errors these are a full or read-only disk, a missing package, and errors that Lightning raises on
    purpose: its trainer and callbacks check their settings, and those of the loggers, only when the run starts.
    """
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, OSError) and disk_error(error) is not None:
        return f"{error.filename or 'a file'} cannot be written or read: {error.strerror}"
    if isinstance(error, ImportError):
        text = with_install_hint(error)
        if _raised_on_purpose(error):
            return f"{_setting_at_fault(error)}: {text}"
        return text if _missing_package(error) else None
    if isinstance(error, MisconfigurationException) or _raised_on_purpose(error):
        return f"{_setting_at_fault(error)}: {error}"
    return None


def _setting_at_fault(error: BaseException) -> str:
    """The setting that selects the Lightning class which raised an error, or the trainer's setting that it mentions."""
    file = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if file.stem == "model_checkpoint":
        return "checkpoint"
    mentioned = _first_mentioned(inspect.signature(Trainer).parameters, str(error))
    return SETTINGS_BY_FOLDER.get(file.parent.name) or (f"trainer.{mentioned}" if mentioned else "trainer")


def _first_mentioned(names: Iterable[str], text: str) -> str | None:
    """The name that appears first in a text."""
    places = {name: found.start() for name in names if (found := re.search(rf"(?<![\w.]){name}(?!\w)", text))}
    return min(places, key=places.__getitem__) if places else None


def _raised_on_purpose(error: BaseException) -> bool:
    """Whether a `raise` statement in Lightning's own code raised the error, rather than code that Lightning called."""
    at = traceback.extract_tb(error.__traceback__)[-1:]
    return (
        type(error) in (ValueError, TypeError, RuntimeError, ImportError, ModuleNotFoundError)
        and bool(at)
        and "/lightning/" in Path(at[0].filename).as_posix()
        and (at[0].line or "").startswith("raise ")
    )


def with_install_hint(error: ImportError) -> str:
    """The message of an import error, with the command that installs the missing package."""
    text = str(error)
    missing = _missing_package(error)
    if missing in EXTRAS:
        return f"{text}; pip install 'rlrt-lightning[{EXTRAS[missing]}]'"
    return f"{text}; pip install {missing}" if missing and "pip install" not in text else text


def _missing_package(error: ImportError) -> str | None:
    """The missing package, if an import error names one."""
    named = re.findall(r"`(\w+)`", str(error))
    for name in [error.name.partition(".")[0]] if error.name else named:
        with suppress(ValueError, ImportError):
            if name.islower() and find_spec(name) is None:
                return name
    return None


def constructor_error(
    error: Exception, setting: str, make: Callable[..., Any], settings: Mapping[str, Any]
) -> ConfigError | None:
    """Turns a constructor's error into one that names the setting.

    Args:
        error: The exception raised by the constructor.
        setting: Name of the setting that selects the class.
        make: Calls the constructor.
        settings: The arguments of the constructor.

    Returns:
        The error, or None if the constructor has a bug: a TypeError in user code, or an exception that is not in
        `ARGUMENT_ERRORS`.
    """
    if not isinstance(error, ARGUMENT_ERRORS) or (isinstance(error, TypeError) and _in_user_code(error)):
        return None
    text = with_install_hint(error) if isinstance(error, ImportError) else str(error)
    if isinstance(error, ConfigError) and re.match(r"(data|model|trainer|checkpoint)\b", text):
        return error
    rejected = _first_mentioned(settings, text) or _rejected_setting(make, settings)
    return ConfigError(f"{setting}.{rejected}: {text}" if rejected else f"{setting}: {text}")


def _rejected_setting(make: Callable[..., Any], settings: Mapping[str, Any]) -> str | None:
    """The setting without which the constructor accepts the others."""
    for name in settings:
        with suppress(Exception):
            make(**{k: list(v) if isinstance(v, list) else v for k, v in settings.items() if k != name})
            return name
    return None


def setting_of(cls: type, arguments: Mapping[str, Any], config: Any, name: str = "") -> str | None:
    """Finds the setting for which a class is instantiated.

    Args:
        cls: The class.
        arguments: The arguments of its constructor.
        config: Nested settings by name.
        name: Name of the setting that holds them.
    """
    if isinstance(config, (list, tuple)):
        return next((found for part in config if (found := setting_of(cls, arguments, part, name))), None)
    if not isinstance(config, (dict, Namespace)):
        return None
    parts = config if isinstance(config, dict) else vars(config)
    path = parts.get("class_path", cls.__name__)
    own = parts.get("init_args", {}) if "class_path" in parts else parts
    own = own if isinstance(own, dict) else vars(own)
    plain = {k: v for k, v in arguments.items() if v is None or isinstance(v, (bool, int, float, str))}
    same = set(own) == set(arguments) and all(
        str(own[k]) == str(v) for k, v in plain.items()
    )  # NaN is not equal to NaN
    if same and path.rpartition(".")[2] == cls.__name__:
        return name
    nested = ((f"{name}.{key}" if name else key, part) for key, part in own.items())
    return next((found for inner, part in nested if (found := setting_of(cls, arguments, part, inner))), None)


def _in_user_code(error: Exception) -> bool:
    """Whether an error was raised outside this package and all installed packages."""
    frame = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    file, paths = Path(frame.f_code.co_filename).resolve(), sysconfig.get_paths()
    installed = [Path(paths[kind]).resolve() for kind in ("stdlib", "purelib", "platlib")]
    ours = frame.f_globals.get("__name__", "").startswith("rlrt_lightning.")
    return not (ours or any(file.is_relative_to(folder) for folder in installed))
