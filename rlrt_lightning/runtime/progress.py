"""Progress bars of what happens outside of Lightning's own loops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


class Progress:
    """Shows how far a phase is, below Lightning's own bar and only where that is shown.

    Args:
        hidden: Show nothing.
    """

    def __init__(self, hidden: bool = True) -> None:
        self.hidden = hidden

    @classmethod
    def beside(cls, trainer: Any) -> Progress:
        """Hidden where the trainer's own bar is."""
        bar = trainer.progress_bar_callback
        return cls(bar is None or getattr(bar, "is_disabled", False) or trainer.sanity_checking)

    def __call__(self, what: str, items: Iterable[T], total: int) -> Iterator[T]:
        """The items, counted as they pass."""
        yield from tqdm(items, total=total, desc=what, leave=False, disable=self.hidden, dynamic_ncols=True)
