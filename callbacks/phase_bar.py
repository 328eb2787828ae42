"""One live line in the terminal for what the run is doing."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from tqdm import tqdm

from rlrt_lightning.runtime.progress import Advance, Progress
from rlrt_lightning.runtime.terminal import is_interactive

COUNTED = "{desc}  {bar:24}  {n_fmt}/{total_fmt}{postfix}"
UNCOUNTED = "{desc}{postfix}"


class PhaseBar(Progress, ProgressBar):
    """Shows the current phase (rollouts, verdicts, scoring, updates) in one line, with counts and tokens per second.

    The line is redrawn in an interactive terminal only. It replaces Lightning's default progress bar; any other
    progress bar in `trainer.callbacks` replaces it, and `trainer.enable_progress_bar=false` disables it. The lines that
    stay are printed by `RunReport`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._line: tqdm[Any] | None = None
        self._since = 0.0
        self._tokens = 0

    @property
    def is_disabled(self) -> bool:
        """Whether nothing is shown: on ranks other than 0, and if the output is not a terminal."""
        return not (self._enabled and is_interactive())

    def disable(self) -> None:
        """See `ProgressBar.disable`."""
        self._enabled = False

    def enable(self) -> None:
        """See `ProgressBar.enable`."""
        self._enabled = True

    @contextmanager
    def phase(self, what: str, total: int | None = None) -> Iterator[Advance]:
        """See `Progress.phase`."""
        self._open(what, total)
        try:
            yield self._advance
        finally:
            self._close()

    def _open(self, what: str, total: int | None) -> None:
        self._close()
        self._since, self._tokens = time.monotonic(), 0
        if not self.is_disabled:
            form = UNCOUNTED if total is None else COUNTED
            description = f"{self._where()}  {what}"
            size = shutil.get_terminal_size()  # tqdm draws nothing in a terminal of unknown size
            self._line = tqdm(
                desc=description,
                total=total,
                bar_format=form,
                leave=False,
                ncols=size.columns - 1,
                nrows=size.lines,
                file=sys.stdout,
            )

    def _advance(self, items: int, tokens: int) -> None:
        if self._line is None:
            return
        self._tokens += tokens
        if self._tokens:
            speed = self._tokens / max(time.monotonic() - self._since, 1e-3)
            self._line.set_postfix_str(f" {self._tokens:,} tokens  {speed:,.0f} tokens/s", refresh=False)
        self._line.update(items or 1)
        if self._line.n == self._line.total:  # tqdm skips updates that follow each other within 0.1 s
            self._line.refresh()

    def _close(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    def _where(self) -> str:
        trainer = self.trainer
        if trainer.sanity_checking:
            return "before training"
        if trainer.state.fn == "fit":
            return epoch_of(trainer)
        return trainer.state.fn.value if trainer.state.fn is not None else ""

    # -- Lightning's hooks -----------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Begins the updates of an epoch."""
        self._open("updates", int(trainer.num_training_batches))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts a micro-batch."""
        self._advance(1, batch.padded_tokens)
        if batch_idx + 1 >= trainer.num_training_batches:
            self._close()

    def on_exception(self, *_: Any) -> None:
        """Removes the line, so that the error's message begins on a new one."""
        self._close()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Removes the line."""
        self._close()


def epoch_of(trainer: Trainer) -> str:
    """The current epoch, from 1, of how many."""
    most = trainer.max_epochs
    return f"epoch {trainer.current_epoch + 1}" + (f"/{most}" if most and most > 0 else "")


def adopt_progress_bar(trainer: Any) -> None:
    """Removes the progress bar that the trainer has created itself, so that `PhaseBar` takes its place. One with other
    settings than Lightning's is the user's."""
    bar = trainer.progress_bar_callback
    if type(bar) in (RichProgressBar, TQDMProgressBar) and vars(bar) == vars(type(bar)()):
        trainer.callbacks.remove(bar)
        trainer.callbacks.append(PhaseBar())
