"""Pickling of tasks for worker processes, which import the task's code again."""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import cloudpickle

from rlrt_lightning.runtime.errors import ConfigError, first_line
from rlrt_lightning.tasks.base import Task

_ADVICE = "put rewards and tasks at the top level of an importable file, as functions or classes"
_lock = threading.Lock()


def pickled(task: Task) -> bytes:
    """Pickles a task for the worker processes.

    They import what is defined in a file. What is defined in a notebook's cell, on standard input or in an interactive
    session cannot be imported, so its code and the global variables that it uses are sent along (cloudpickle), with
    their values at the start of the run.

    Raises:
        ConfigError: If they cannot load it, for example because it holds an open file, or a lambda in a script.
    """
    try:
        return pickle.dumps(task) if _main_is_a_file() else cloudpickle.dumps(task)
    except Exception as error:
        raise ConfigError(
            f"the task {type(task).__name__} cannot be pickled for the verifier's processes: {type(error).__name__}: "
            f"{first_line(error)}; {_ADVICE}, and use only plain data in them"
        ) from error


def _main_is_a_file() -> bool:
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    return getattr(main, "__spec__", None) is not None or (file is not None and not file.startswith("<"))


@contextmanager
def without_stdin_file() -> Iterator[None]:
    """Lets multiprocessing start a process from a script on standard input. The `__file__` of such a script is
    `<stdin>`, which the new process would try to import."""
    main = sys.modules["__main__"]
    with _lock:
        file = getattr(main, "__file__", None)
        hidden = file is not None and not _main_is_a_file()
        if hidden:
            del main.__file__
        try:
            yield
        finally:
            if hidden:
                main.__file__ = file
