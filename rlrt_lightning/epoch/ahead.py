"""Rollouts of the next epoch, drawn while this one trains."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import Any

from rlrt_lightning.rollouts.base import Rollout
from rlrt_lightning.tasks.base import Verdict

Drawn = tuple[Rollout, "Future[Verdict]"]
"""A rollout, with its verdict under way."""


class Ahead:
    """At most one epoch's rollouts, on their way in a thread, or waiting to be trained on."""

    def __init__(self) -> None:
        self._coming: Future[tuple[list[Drawn], float]] | None = None

    def begin(self, drawing: Iterator[Drawn]) -> None:
        """Goes on without the caller. The first rollout comes before this returns, so that what an engine checks first
        is checked while nobody trains."""
        start = time.perf_counter()
        drawn = [next(drawing)]
        coming: Future[tuple[list[Drawn], float]] = Future()

        def work() -> None:
            try:
                drawn.extend(drawing)
                coming.set_result((drawn, time.perf_counter() - start))
            except BaseException as error:
                coming.set_exception(error)

        self._coming = coming
        threading.Thread(target=work, name="rollouts-ahead", daemon=True).start()

    def wait(self) -> None:
        """Until nothing is on its way: an engine samples from one set of weights at a time."""
        if self._coming is not None:
            wait([self._coming])

    def take(self) -> tuple[list[Drawn], float] | None:
        """The rollouts and the seconds that drawing them took; None where none were begun. What went wrong in the
        thread is raised here."""
        coming, self._coming = self._coming, None
        return None if coming is None else coming.result()

    def rows(self) -> list[dict[str, Any]]:
        """The rollouts as plain values for a checkpoint; waits for them. None, where drawing them has failed: who
        resumes draws them anew."""
        self.wait()
        if self._coming is None or self._coming.exception() is not None:
            return []
        return [
            {
                "group": r.group,
                "index": r.index,
                "response_ids": r.response_ids,
                "logp_sampler": r.logp_sampler,
                "entropy": r.entropy,
                "truncated": r.truncated,
            }
            for r, _ in self._coming.result()[0]
        ]
