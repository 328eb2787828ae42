"""Stops a run, on a signal or a callback's request, at a point from which it can be resumed exactly."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rlrt_lightning.runtime.ranks import rank

EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""Exit codes of a process ended by a signal: 128 plus its number, as in shells. Other signals, such as SLURM's request
to requeue, have that of SIGTERM."""

SIGINT_MESSAGE = b"\nstopping as soon as the run can be resumed exactly; Ctrl-C again stops at once\n"


class Stop(SIGTERMException):
    """Ends a run on request. Only rank 0 exits with the signal's code: a non-zero code of another rank would make
    Lightning kill rank 0."""


class StopSignal:
    """Whether a signal has asked the run to end: SIGTERM, Ctrl-C (SIGINT), or that of SLURM's requeueing.

    Its handlers replace Lightning's, which call torch.distributed wherever the signal arrives, end the epoch between
    two micro-batches of one optimizer step, and save at once. Lightning installs its handlers between the last hook of
    the setup and the first dataloader hook, so `listen` has to be called from the latter; after the run Lightning
    restores the handlers that were there before.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that was received."""
        self.requeue: Callable[[], None] | None = None
        """Lightning's handler that saves the run and has SLURM start the job again; None without requeueing."""
        self.requeue_asked = False
        """Whether it was the signal to requeue."""
        self._immediate = False
        self._active = False
        self._users: Any = None  # handler of SIGTERM

    def begin(self) -> None:
        """Forgets earlier signals. To be called while a run is set up, before Lightning installs its handlers."""
        self.number, self.requeue, self.requeue_asked = None, None, False
        self._active, self._users = True, signal.getsignal(signal.SIGTERM)

    def listen(self, trainer: Trainer) -> None:
        """Replaces Lightning's handlers if that has not been done; only the main thread can."""
        if not self._active or threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            return
        for number in signal.valid_signals() - {signal.SIGTERM}:
            handler: Any = signal.getsignal(number)
            if getattr(handler, "__module__", "").partition(".")[0] == "lightning":  # that of SLURM's requeueing
                self.requeue = partial(handler, number, None)
                signal.signal(number, self._on_requeue)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not a user's own
            signal.signal(signal.SIGINT, self._on_sigint)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        if trainer.received_sigterm:  # by Lightning's handler, before this one replaced it
            self.number = signal.SIGTERM

    def _on_sigterm(self, number: int, frame: Any) -> None:
        self.receive(number)
        if callable(self._users):
            self._users(number, frame)

    def _on_sigint(self, number: int, frame: Any) -> None:
        if self.number is not None:  # Ctrl-C again
            raise KeyboardInterrupt
        self.receive(number)
        if rank() == 0:
            os.write(2, SIGINT_MESSAGE)  # a handler may interrupt a print

    def _on_requeue(self, number: int, frame: Any) -> None:
        self.requeue_asked = True
        self.receive(number)

    def receive(self, number: int) -> None:
        """Handles a signal: records it, and ends the run if the current phase may be aborted."""
        self.number = number
        if self._immediate:
            raise Stop(self._exit_code)

    @property
    def _exit_code(self) -> int:
        return EXIT_CODES.get(signal.Signals(self.number or signal.SIGTERM), EXIT_CODES[signal.SIGTERM])

    def check(self, trainer: Trainer) -> None:
        """Ends the run if any rank received a signal. All ranks must call it."""
        self.listen(trainer)
        asked = self.number is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            raise Stop(self._exit_code if trainer.is_global_zero else 0)

    @contextmanager
    def interruptible(self, trainer: Trainer) -> Iterator[None]:
        """Wraps work that does not change the weights and can be repeated. A single rank stops immediately on a signal;
        several ranks finish the work first, because the others would wait for one that stops early."""
        self.check(trainer)
        try:
            self._immediate = trainer.world_size == 1
            if self._immediate and self.number is not None:  # received since the check above
                raise Stop(self._exit_code)
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
