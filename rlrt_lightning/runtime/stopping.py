"""A run that is asked to end by a signal does so where it can be resumed exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

EXIT_CODE = 143
"""Of a process that ends because of SIGTERM, as shells have it."""


class Stop(SIGTERMException):
    """Ends a run that was asked to. Other ranks than the first end with 0: Lightning would kill it for theirs."""


class StopSignal:
    """Whether a signal has asked the run to end, which the `SafeStop` callback listens for."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that was received."""
        self._at_once = False

    def receive(self, number: int) -> None:
        """Takes note of a signal; the body of its handler."""
        self.number = number
        if self._at_once:
            raise Stop(EXIT_CODE)

    def check(self, trainer: Trainer) -> None:
        """Ends the run if any rank was asked to; all ranks have to call."""
        asked = self.number is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            raise Stop(EXIT_CODE if trainer.is_global_zero else 0)

    @contextmanager
    def may_end(self, trainer: Trainer) -> Iterator[None]:
        """Work that leaves the weights as they are and can be made again. With one rank it ends at once; with several
        they finish it, as one that ends in the middle would leave the others waiting."""
        self.check(trainer)
        try:
            self._at_once = trainer.world_size == 1
            if self._at_once and self.number is not None:  # it came in between
                raise Stop(EXIT_CODE)
            yield
        finally:
            self._at_once = False
        self.check(trainer)


class WholeEpochs:
    """Has a run that a callback wants to end (`trainer.should_stop`: a time limit, early stopping, ...) finish its
    epoch first. Lightning would end between two optimizer steps, and leave out the others without a word."""

    def __init__(self) -> None:
        self._wanted = False
        self._last = False

    def begin(self, trainer: Trainer) -> None:
        """An epoch begins."""
        self._last = False
        self.hold(trainer)

    def hold(self, trainer: Trainer, batch_idx: int | None = None) -> None:
        """Puts the end off until the epoch's last micro-batch; to be called after the callbacks' hooks.

        Args:
            trainer: The trainer.
            batch_idx: Number of the micro-batch that was trained on.
        """
        if batch_idx is not None:
            self._last = batch_idx + 1 >= trainer.num_training_batches
        self._wanted |= trainer.should_stop
        trainer.should_stop = self._wanted and self._last
        if self._last:
            self._wanted = False
