"""Progress of the phases of an epoch and of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar


class _HasTokens(Protocol):
    response_ids: list[int]


T = TypeVar("T")
V = TypeVar("V")
R = TypeVar("R", bound=_HasTokens)

Advance = Callable[[int, int], None]
"""Reports progress: the number of finished items, and the number of their tokens."""


class Progress:
    """Displays the progress of phases; this one displays nothing. `PhaseBar` is the one of a run."""

    @classmethod
    def for_trainer(cls, trainer: Any) -> Progress:
        """The trainer's progress bar if it displays phases."""
        bar = trainer.progress_bar_callback
        return bar if isinstance(bar, Progress) else Progress()

    def phase(self, what: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Displays a phase while the context is open.

        Args:
            what: Name of the phase.
            total: Number of items; None if only tokens are counted.
        """
        return nullcontext(lambda items, tokens: None)

    def __call__(self, what: str, items: Iterable[T], total: int) -> Iterator[T]:
        """Yields the items of a phase and displays how many are done.

        Args:
            what: Name of the phase.
            items: The items.
            total: Their number.
        """
        with self.phase(what, total) as advance:
            for item in items:
                advance(1, 0)
                yield item

    def rollouts(self, drawing: Iterable[tuple[R, V]], total: int, what: str = "") -> list[tuple[R, V]]:
        """Collects rollouts, displaying their number and tokens.

        Args:
            drawing: The rollouts, each with its pending verdict.
            total: Their number.
            what: Name of the phase, if it is not rollouts.
        """
        drawn = []
        with self.phase(what or "rollouts", total) as advance:
            for pair in drawing:
                advance(1, len(pair[0].response_ids))
                drawn.append(pair)
        return drawn
