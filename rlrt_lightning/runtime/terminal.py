"""Prints to the terminal: lines that stay, warnings, and what a long wait is for."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

from rlrt_lightning.runtime.ranks import rank

PATIENCE_S = 5.0
"""Seconds after which a wait is announced."""


def is_interactive() -> bool:
    """Whether the output is a terminal that a line can be redrawn in; a pipe, a file or a SLURM job's log is not."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def say(text: str, file: TextIO | None = None) -> None:
    """Prints lines that stay, above a progress bar if there is one.

    Args:
        text: The lines.
        file: Where to; None for stdout.
    """
    with tqdm.external_write_mode(file=sys.stdout):
        print(text, file=file or sys.stdout, flush=True)


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Prints what the program waits for if the work inside takes longer than `PATIENCE_S`. Rank 0 only.

    Args:
        what: What it waits for.
    """
    timer = threading.Timer(PATIENCE_S, say, [f"waiting for {what}"], {"file": sys.stderr})
    timer.daemon = True
    if rank() == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


class TerminalHandler(logging.Handler):
    """Writes log messages to stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        say(self.format(record), file=sys.stderr)


NOISE = (
    "Seed set to",
    "GPU available: False",
    "TPU available: False",
    "💡 Tip",
    "`Trainer.fit` stopped: `max_epochs=",
    "Restoring states from the checkpoint",
    "Restored all states from the checkpoint",
    "Loaded model weights from the checkpoint",
    "Detected KeyboardInterrupt",
)
"""Beginnings of Lightning's messages that tell a user nothing that is not printed already."""


def _helps(record: logging.LogRecord) -> bool:
    return not record.getMessage().strip().startswith(NOISE)


def set_up() -> None:
    """Prepares the terminal of a command: drops `NOISE`, keeps messages apart from the progress bar, and keeps the bars
    of downloads out of log files. A program that has configured logging keeps its configuration."""
    if not sys.stderr.isatty():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    if logging.getLogger().handlers:
        return
    handler = TerminalHandler()
    handler.addFilter(_helps)
    for name in ("lightning.pytorch", "lightning.fabric", "rlrt_lightning"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False


@contextmanager
def loading_quietly(local: bool) -> Iterator[None]:
    """Turns off transformers' bar for reading weights, which tells nothing about a small model; `waiting_for` announces
    a large one.

    Args:
        local: Whether the weights are on this machine. In a terminal, the bars of a download are kept.
    """
    from transformers.utils import logging as transformers_logging

    if not transformers_logging.is_progress_bar_enabled() or (sys.stderr.isatty() and not local):
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
