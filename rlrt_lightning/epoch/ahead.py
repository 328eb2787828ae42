"""Generating the next epoch's rollouts while the current epoch trains."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any

from rlrt_lightning.epoch.record import Drawn, Questions, Verify
from rlrt_lightning.policy.model import Policy
from rlrt_lightning.rollouts.base import Rollout
from rlrt_lightning.runtime.ranks import rank, world_size


def restore(rows: Sequence[dict[str, Any]], questions: Questions, policy: Policy, submit: Verify) -> list[Drawn]:
    """This rank's rollouts from a checkpoint.

    Args:
        rows: All ranks' rollouts (`Ahead.rows`) with their `place` among the rollouts' problems of all ranks.
        questions: This rank's problems.
        policy: Decodes the responses.
        submit: Submits a completion to the verifier.
    """
    drawn = list[Drawn]()
    for row in rows:
        group, owner = divmod(row["place"], world_size())
        if owner == rank():
            values = {name: value for name, value in row.items() if name not in ("place", "group")}
            text = policy.decode(row["response_ids"])
            rollout = Rollout(group, prompt_ids=questions.prompts[group], text=text, **values)
            drawn.append((rollout, submit(questions.problems[group], text)))
    return drawn


def tokens_of(drawn: Iterable[Drawn]) -> int:
    """The number of response tokens."""
    return sum(len(rollout.response_ids) for rollout, _ in drawn)


class Ahead:
    """Generates the rollouts of one epoch in a background thread and holds them until they are trained on."""

    def __init__(self) -> None:
        self._future: Future[tuple[list[Drawn], float]] | None = None

    def begin(self, drawing: Iterator[Drawn]) -> None:
        """Starts the thread. The first rollout is generated before this returns, so that the engine's initial checks
        run before training starts."""
        start = time.perf_counter()
        drawn = [next(drawing)]
        future: Future[tuple[list[Drawn], float]] = Future()

        def work() -> None:
            try:
                drawn.extend(drawing)
                future.set_result((drawn, time.perf_counter() - start))
            except BaseException as error:
                future.set_exception(error)

        self._future = future
        threading.Thread(target=work, name="rollouts-ahead", daemon=True).start()

    def wait(self) -> None:
        """Waits until the thread is done: an engine samples from one set of weights at a time."""
        if self._future is not None:
            wait([self._future])

    def take(self) -> tuple[list[Drawn], float] | None:
        """Returns the rollouts and the seconds that generating them took; None if `begin` was not called. Raises the
        thread's exception, if any."""
        future, self._future = self._future, None
        return None if future is None else future.result()

    def rows(self) -> list[dict[str, Any]]:
        """Waits for the rollouts and returns them as plain values for a checkpoint. Empty if generating them failed; a
        resumed run generates them again."""
        self.wait()
        if self._future is None or self._future.exception() is not None:
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
            for r, _ in self._future.result()[0]
        ]
