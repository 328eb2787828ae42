"""What it takes to send a task to worker processes, which import its code anew."""

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

_ADVICE = "put rewards and tasks at the top level of a file that can be imported, as functions or classes"
_lock = threading.Lock()


class _Pickler(pickle.Pickler):
    """Notes the classes and functions that stand in the script or the session itself."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        self.of_main: list[str] = []
        super().__init__(self.buffer)

    def persistent_id(self, obj: Any) -> None:
        """See `pickle.Pickler.persistent_id`: called with every object, classes and functions among them."""
        if isinstance(obj, (type, types.FunctionType)) and obj.__module__ == "__main__":
            self.of_main.append(obj.__qualname__)


def pickled(task: Task) -> bytes:
    """A task as worker processes can load it.

    Raises:
        ConfigError: If they cannot: it holds a lambda, an open file, something of a notebook's cell, ...
    """
    pickler = _Pickler()
    try:
        pickler.dump(task)
    except Exception as error:
        raise ConfigError(
            f"the task {type(task).__name__} cannot be pickled for the verifier's processes: {type(error).__name__}: "
            f"{first_line(error)}; {_ADVICE}, and let the task hold plain data only"
        ) from error
    if pickler.of_main and not _main_is_a_file():
        raise ConfigError(
            f"the task {type(task).__name__} uses {pickler.of_main[0]}, which is defined in a notebook, on standard "
            f"input or in an interactive session, where the verifier's processes cannot import it; {_ADVICE}"
        )
    return pickler.buffer.getvalue()


def _main_is_a_file() -> bool:
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    return getattr(main, "__spec__", None) is not None or (file is not None and not file.startswith("<"))


@contextmanager
def main_as_it_is() -> Iterator[None]:
    """Lets multiprocessing start a process from a script on standard input. Such a script says that its file is
    `<stdin>`, which the new process would look for in order to import it."""
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
