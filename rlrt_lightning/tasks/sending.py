"""Pickling of tasks for worker processes, which import the task's code again."""

from __future__ import annotations

import io
import pickle
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlrt_lightning.runtime.errors import ConfigError, first_line
from rlrt_lightning.tasks.base import Task

_ADVICE = "put rewards and tasks at the top level of an importable file, as functions or classes"
_lock = threading.Lock()


class _Pickler(pickle.Pickler):
    """Records the classes and functions that are defined in `__main__`."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        self.from_main: list[str] = []
        super().__init__(self.buffer)

    def persistent_id(self, obj: Any) -> None:
        """See `pickle.Pickler.persistent_id`: called with every object, including classes and functions."""
        if isinstance(obj, (type, types.FunctionType)) and obj.__module__ == "__main__":
            self.from_main.append(obj.__qualname__)


def pickled(task: Task) -> bytes:
    """Pickles a task for the worker processes.

    Raises:
        ConfigError: If they cannot load it, for example because it holds a lambda, an open file, or an object defined
            in a notebook cell.
    """
    pickler = _Pickler()
    try:
        pickler.dump(task)
    except Exception as error:
        raise ConfigError(
            f"the task {type(task).__name__} cannot be pickled for the verifier's processes: {type(error).__name__}: "
            f"{first_line(error)}; {_ADVICE}, and store only plain data in the task"
        ) from error
    if pickler.from_main and not _main_is_a_file():
        raise ConfigError(
            f"the task {type(task).__name__} uses {pickler.from_main[0]}, which is defined in a notebook, on standard "
            f"input or in an interactive session, so the verifier's processes cannot import it; {_ADVICE}"
        )
    return pickler.buffer.getvalue()


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
