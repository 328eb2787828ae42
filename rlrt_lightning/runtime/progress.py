"""Progress bars for phases outside Lightning's own loops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


class Progress:
    """A progress bar for one phase, below Lightning's own bar.

    Args:
        hidden: Disable the bar.
    """

    def __init__(self, hidden: bool = True) -> None:
        self.hidden = hidden

    @classmethod
    def for_trainer(cls, trainer: Any) -> Progress:
        """A progress bar that is hidden if the trainer's own bar is."""
        bar = trainer.progress_bar_callback
        return cls(bar is None or getattr(bar, "is_disabled", False) or trainer.sanity_checking)

    def __call__(self, what: str, items: Iterable[T], total: int) -> Iterator[T]:
        """Yields the items and updates the bar."""
        yield from tqdm(items, total=total, desc=what, leave=False, disable=self.hidden, dynamic_ncols=True)
