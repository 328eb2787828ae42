"""Ends all ranks when one fails or dies."""

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

HEARTBEAT_S = 1.0
"""Seconds between two heartbeats."""

RESUME = "resume from the last checkpoint with --ckpt_path last"

CONNECTION_ERROR = re.compile("gloo|nccl|connection|socket|store", re.IGNORECASE)
"""Matches the messages of errors from a broken connection."""

FAILED_EXIT_CODE = 3
"""Exit code of a rank that ends because another one failed."""

ENDED = "end"
"""Prefix of a rank's last heartbeat, followed by the reason if the rank failed."""


class RankGuard(Callback):
    """Ends all ranks when one fails or stops sending heartbeats, with a line that says which one and why.

    Without it, the others would wait in a collective until its timeout, which must be long because ranks also wait for
    the slowest one's rollouts. Heartbeats go through a torch.distributed store on rank 0. Does nothing with one rank.

    Args:
        timeout_s: Seconds without a heartbeat after which a rank counts as dead; null disables heartbeats.
    """

    def __init__(self, timeout_s: float | None = 120.0) -> None:
        if timeout_s is not None and not 5 <= timeout_s < math.inf:
            raise ConfigError(f"rank_guard.timeout_s is {timeout_s}; it has to be at least 5, or null")
        self.timeout_s = timeout_s
        self._heartbeat: _Heartbeat | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts the heartbeat thread.

        Raises:
            ConfigError: If rank 0 cannot be reached.
        """
        if self.timeout_s is not None and trainer.world_size > 1 and self._heartbeat is None:
            self._heartbeat = _Heartbeat(trainer, self.timeout_s)
            self._heartbeat.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Announces the regular end of this rank, so the others do not expect further heartbeats."""
        if self._heartbeat is not None:
            self._heartbeat.finish("")
            self._heartbeat = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Announces to the other ranks why this one ends.

        Raises:
            RankError: If it ends because the connection to another rank was lost.
        """
        if self._heartbeat is None:
            return
        heartbeat, self._heartbeat = self._heartbeat, None
        if isinstance(exception, Stop):  # raised on all ranks
            heartbeat.finish("")
            return
        lost = heartbeat.silent() if CONNECTION_ERROR.search(str(exception)) else []
        reason = f"rank {lost[0]} does not respond" if lost else f"{type(exception).__name__}: {first_line(exception)}"
        heartbeat.finish(reason)
        if lost:
            raise RankError(f"{reason}: its process ended or its machine is unreachable; {RESUME}") from exception


class RankError(ConfigError):
    """A rank was lost, so the run cannot continue."""


class _Heartbeat(threading.Thread):
    """Writes this rank's heartbeats and reads those of the others."""

    def __init__(self, trainer: Trainer, timeout_s: float) -> None:
        super().__init__(name="rank-guard", daemon=True)
        self.rank, self.ranks, self.timeout_s = trainer.global_rank, trainer.world_size, timeout_s
        environment = getattr(trainer.strategy, "cluster_environment", None)
        host = environment.main_address if environment is not None else "127.0.0.1"
        limit = timedelta(seconds=timeout_s)
        if self.rank == 0:
            # A separate store, because a rank that waits on the default store could not send heartbeats through it.
            self.store = torch.distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit)
        port = trainer.strategy.broadcast(self.store.port if self.rank == 0 else 0)
        if self.rank:
            try:
                self.store = torch.distributed.TCPStore(
                    host, port, is_master=False, wait_for_workers=False, timeout=limit
                )
            except RuntimeError as error:
                raise ConfigError(
                    f"rank_guard: rank {self.rank} cannot reach rank 0 at {host}, port {port}; open the ports between "
                    "the machines, or set rank_guard.timeout_s to null"
                ) from error
        self.stopped = threading.Event()

    def run(self) -> None:
        """Sends a heartbeat and checks the other ranks, once every `HEARTBEAT_S` seconds."""
        now = time.monotonic()
        heard = {other: ("", now) for other in range(self.ranks) if other != self.rank}
        beat = 0
        while heard and not self.stopped.wait(HEARTBEAT_S):
            beat += 1
            try:
                self.store.set(_key(self.rank), str(beat))
                for other in list(heard):
                    self._check(other, heard)
            except RuntimeError:  # the base class of torch.distributed's errors
                if not self.stopped.is_set() and 0 in heard:
                    self._exit("rank 0, which relays the heartbeats, is gone", FAILED_EXIT_CODE)
                return

    def _check(self, other: int, heard: dict[int, tuple[str, float]]) -> None:
        beat, now = self._read(other), time.monotonic()
        previous, since = heard[other]
        if beat.startswith(ENDED):
            if reason := beat.removeprefix(ENDED):
                # The failed rank reports the error by its exit code; Lightning would kill it if this one were not 0.
                self._exit(f"rank {other} has failed ({reason})", FAILED_EXIT_CODE if self.rank == 0 else 0)
            del heard[other]
        elif beat != previous:
            heard[other] = beat, now
        elif now - since > self.timeout_s:
            self._exit(f"rank {other} did not respond for {self.timeout_s:g} s", FAILED_EXIT_CODE)

    def _read(self, other: int) -> str:
        return self.store.get(_key(other)).decode() if self.store.check([_key(other)]) else ""

    def silent(self) -> list[int]:
        """The ranks that send no heartbeat within four intervals."""
        others = [other for other in range(self.ranks) if other != self.rank]
        try:
            before = [self._read(other) for other in others]
            time.sleep(4 * HEARTBEAT_S)
            after = [self._read(other) for other in others]
        except RuntimeError:
            return [0]  # the store is on rank 0
        return [o for o, a, b in zip(others, before, after, strict=True) if a == b and not a.startswith(ENDED)]

    def finish(self, reason: str) -> None:
        """Stops the thread and announces the end of this rank; a reason makes the others end too."""
        self.stopped.set()
        self.join()
        try:
            self.store.set(_key(self.rank), ENDED + reason)
            if self.rank == 0:
                self._wait_for_others(3 * HEARTBEAT_S if reason else self.timeout_s)
        except RuntimeError:
            log.debug("rank 0's store closed before this rank ended")

    def _wait_for_others(self, patience_s: float) -> None:
        """Waits until the others have ended too, because the store closes with this rank."""
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if all(self._read(other).startswith(ENDED) for other in range(1, self.ranks)):
                return
            time.sleep(0.05)

    def _exit(self, what: str, code: int) -> None:
        print(f"error: {what}: rank {self.rank} ends too; {RESUME}", file=sys.stderr, flush=True)
        os._exit(code)  # an exception here would not interrupt the main thread, which waits in a collective


def _key(rank: int) -> str:
    return f"rank/{rank}"
