"""Stops a run, on a signal or a callback's request, at a point from which it can be resumed exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

EXIT_CODE = 143
"""Exit code of a process ended by SIGTERM: 128 + 15, as in shells."""


class Stop(SIGTERMException):
    """Ends a run on request. Only rank 0 exits with `EXIT_CODE`: a non-zero code of another rank would make Lightning
    kill rank 0."""


class StopSignal:
    """Records a signal that asks the run to end. The `SafeStop` callback installs the handler."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal received, or None."""
        self._immediate = False

    def receive(self, number: int) -> None:
        """Records a signal; called by the signal handler."""
        self.number = number
        if self._immediate:
            raise Stop(EXIT_CODE)

    def check(self, trainer: Trainer) -> None:
        """Ends the run if any rank received a signal. All ranks must call it."""
        asked = self.number is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            raise Stop(EXIT_CODE if trainer.is_global_zero else 0)

    @contextmanager
    def interruptible(self, trainer: Trainer) -> Iterator[None]:
        """Wraps work that does not change the weights and can be repeated. A single rank stops immediately on a signal;
        several ranks finish the work first, because the others would wait for one that stops early."""
        self.check(trainer)
        try:
            self._immediate = trainer.world_size == 1
            if self._immediate and self.number is not None:  # received since the check above
                raise Stop(EXIT_CODE)
            yield
        finally:
            self._immediate = False
        self.check(trainer)


class WholeEpochs:
    """Defers a callback's request to stop (`trainer.should_stop`: a time limit, early stopping, ...) to the end of the
    epoch. Lightning would stop between two optimizer steps and silently drop the remaining ones."""

    def __init__(self) -> None:
        self._requested = False
        self._last = False

    def begin(self, trainer: Trainer) -> None:
        """Call at the start of an epoch."""
        self._last = False
        self.hold(trainer)

    def hold(self, trainer: Trainer, batch_idx: int | None = None) -> None:
        """Defers the stop to the epoch's last micro-batch. Call it after the callbacks' hooks.

        Args:
            trainer: The trainer.
            batch_idx: Index of the micro-batch just trained on.
        """
        if batch_idx is not None:
            self._last = batch_idx + 1 >= trainer.num_training_batches
        self._requested |= trainer.should_stop
        trainer.should_stop = self._requested and self._last
        if self._last:
            self._requested = False
