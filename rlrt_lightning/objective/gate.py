"""The entropy gate of AntiSD."""

from __future__ import annotations

from statistics import median
from typing import Any


class EntropyGate:
    """Decides for each epoch whether the teacher's signal is used (AntiSD, arXiv:2605.11609, Algorithm 1).

    During the first `warmup_steps` steps it is closed; the median of their entropies is H_warm. After them it is open,
    closes at an entropy below close_at * H_warm, opens again at H_warm or more, and otherwise stays as it is. The paper
    does not state how it starts after the warm-up; open is our choice.

    Args:
        warmup_steps: Number of steps from which H_warm is computed; with 0 the gate is always open.
        close_at: Fraction of H_warm below which it closes.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(self, warmup_steps: int = 5, close_at: float = 0.93) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps is {warmup_steps}; it has to be 0 or more")
        if not 0 <= close_at <= 1:
            raise ValueError(f"close_at is {close_at}; it has to be from 0 to 1")
        self.warmup_steps = warmup_steps
        self.close_at = close_at
        self._warmup: list[float] = []  # the entropies of the warm-up, nats
        self._closed = False  # by a low entropy, after the warm-up

    @property
    def warm_entropy(self) -> float | None:
        """H_warm, nats; None before the end of the warm-up."""
        return median(self._warmup) if 0 < self.warmup_steps == len(self._warmup) else None

    def step(self, entropy: float) -> bool:
        """Takes one step, and returns whether the gate is open.

        Args:
            entropy: Median of the teacher's entropy over all scored tokens, nats.
        """
        warm = self.warm_entropy
        if warm is not None:
            self._closed = entropy < (warm if self._closed else self.close_at * warm)
            return not self._closed
        if self.warmup_steps:
            self._warmup.append(float(entropy))
        return self.warmup_steps == 0

    def state_dict(self) -> dict[str, Any]:
        """The state, for a checkpoint."""
        return {"warmup": list(self._warmup), "closed": self._closed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`. Entropies beyond `warmup_steps`, of a gate with a longer warm-up, are dropped."""
        self._warmup = list(state_dict["warmup"])[: self.warmup_steps]
        self._closed = bool(state_dict["closed"])
