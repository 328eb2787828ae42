"""What happens to the other ranks when one fails or dies."""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import threading
import time
from datetime import timedelta

import torch
from lightning import Callback, LightningModule, Trainer

from rlrt_lightning.runtime.errors import ConfigError, first_line
from rlrt_lightning.runtime.stopping import Stop

log = logging.getLogger(__name__)

BEAT_S = 1.0
"""Seconds between two signs of life."""

RESUME = "what was trained up to the last checkpoint can be resumed with --ckpt_path last"

LOST = re.compile("gloo|nccl|connection|socket|store", re.IGNORECASE)
"""What the errors of a broken connection have in common."""

DEAD = 3
"""Exit code of a rank that ends because another one is gone."""

END = "end"
"""Begins what a rank that ends says; then comes the reason, if it failed."""


class RankGuard(Callback):
    """Ends all ranks, with a line that says which one failed and why, when one fails or shows no sign of life; without
    it the others would wait for it in a collective for as long as its time limit, which has to be long: ranks also wait
    for the slowest one's rollouts.

    The signs go through a store of torch.distributed that the first rank keeps. With one rank there is nothing to do.

    Args:
        timeout_s: A rank of which nothing was heard for so long counts as dead, in seconds; null watches nobody.
    """

    def __init__(self, timeout_s: float | None = 120.0) -> None:
        if timeout_s is not None and not 5 <= timeout_s < math.inf:
            raise ConfigError(f"rank_guard.timeout_s is {timeout_s}; it has to be at least 5, or null")
        self.timeout_s = timeout_s
        self._watch: _Watch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins to watch.

        Raises:
            ConfigError: If the first rank's machine cannot be reached.
        """
        if self.timeout_s is not None and trainer.world_size > 1 and self._watch is None:
            self._watch = _Watch(trainer, self.timeout_s)
            self._watch.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Says goodbye: from here on this rank's silence means nothing."""
        if self._watch is not None:
            self._watch.finish("")
            self._watch = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tells the others why this rank ends.

        Raises:
            RankError: If it ends because the connection to another one broke off.
        """
        if self._watch is None:
            return
        watch, self._watch = self._watch, None
        if isinstance(exception, Stop):  # all of them end
            watch.finish("")
            return
        lost = watch.silent() if LOST.search(str(exception)) else []
        reason = (
            f"nothing is heard of rank {lost[0]}" if lost else f"{type(exception).__name__}: {first_line(exception)}"
        )
        watch.finish(reason)
        if lost:
            raise RankError(f"{reason}: its process has ended or its machine is gone; {RESUME}") from exception


class RankError(ConfigError):
    """A run that cannot go on without a rank that is gone."""


class _Watch(threading.Thread):
    """Writes this rank's sign of life and reads the others'."""

    def __init__(self, trainer: Trainer, timeout_s: float) -> None:
        super().__init__(name="rank-guard", daemon=True)
        self.rank, self.ranks, self.timeout_s = trainer.global_rank, trainer.world_size, timeout_s
        environment = getattr(trainer.strategy, "cluster_environment", None)
        host = environment.main_address if environment is not None else "127.0.0.1"
        limit = timedelta(seconds=timeout_s)
        if self.rank == 0:
            # A store of its own: a rank that waits for something in the common one would be silent here.
            self.store = torch.distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit)
        port = trainer.strategy.broadcast(self.store.port if self.rank == 0 else 0)
        if self.rank:
            try:
                self.store = torch.distributed.TCPStore(
                    host, port, is_master=False, wait_for_workers=False, timeout=limit
                )
            except RuntimeError as error:
                raise ConfigError(
                    f"rank_guard: rank {self.rank} cannot reach the first rank at {host}, port {port}; open the ports "
                    "between the machines, or set rank_guard.timeout_s to null"
                ) from error
        self.stopped = threading.Event()

    def run(self) -> None:
        """Once a beat: says that this rank lives, and listens to the others."""
        now = time.monotonic()
        heard = {other: ("", now) for other in range(self.ranks) if other != self.rank}
        beat = 0
        while heard and not self.stopped.wait(BEAT_S):
            beat += 1
            try:
                self.store.set(_key(self.rank), str(beat))
                for other in list(heard):
                    self._listen(other, heard)
            except RuntimeError:  # torch.distributed's own errors are of this kind
                if not self.stopped.is_set() and 0 in heard:
                    self._give_up("rank 0, through which the ranks hear of each other, is gone", DEAD)
                return

    def _listen(self, other: int, heard: dict[int, tuple[str, float]]) -> None:
        sign, now = self._sign(other), time.monotonic()
        before, when = heard[other]
        if sign.startswith(END):
            if reason := sign.removeprefix(END):
                # The rank that failed says so by its own exit code; Lightning would kill it for ours.
                self._give_up(f"rank {other} has failed ({reason})", DEAD if self.rank == 0 else 0)
            del heard[other]
        elif sign != before:
            heard[other] = sign, now
        elif now - when > self.timeout_s:
            self._give_up(f"nothing was heard of rank {other} for {self.timeout_s:g} s", DEAD)

    def _sign(self, other: int) -> str:
        return self.store.get(_key(other)).decode() if self.store.check([_key(other)]) else ""

    def silent(self) -> list[int]:
        """The ranks that give no sign of life over a few beats."""
        others = [other for other in range(self.ranks) if other != self.rank]
        try:
            before = [self._sign(other) for other in others]
            time.sleep(4 * BEAT_S)
            after = [self._sign(other) for other in others]
        except RuntimeError:
            return [0]  # who keeps the store
        return [o for o, a, b in zip(others, before, after, strict=True) if a == b and not a.startswith(END)]

    def finish(self, reason: str) -> None:
        """Ends the watch. A reason makes the others end too."""
        self.stopped.set()
        self.join()
        try:
            self.store.set(_key(self.rank), END + reason)
            if self.rank == 0:
                self._leave_last(3 * BEAT_S if reason else self.timeout_s)
        except RuntimeError:
            log.debug("rank 0's store was gone before this rank had ended")

    def _leave_last(self, patience_s: float) -> None:
        """The store ends with this rank, so the others have to have heard what it says."""
        until = time.monotonic() + patience_s
        while time.monotonic() < until:
            if all(self._sign(other).startswith(END) for other in range(1, self.ranks)):
                return
            time.sleep(0.05)

    def _give_up(self, what: str, code: int) -> None:
        print(f"error: {what}: rank {self.rank} ends too; {RESUME}", file=sys.stderr, flush=True)
        os._exit(code)  # the main thread waits in a collective, which no exception here would end


def _key(rank: int) -> str:
    return f"rank/{rank}"
