"""Base class of methods whose strength lam may change during training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar, cast

from rlrt_lightning.objective.methods.base import Method

M = TypeVar("M", bound="Scheduled")


class Scheduled(Method):
    """A method with the settings `lam`, `lam_warmup_steps` and `lam_decay_steps`."""

    lam: float
    lam_warmup_steps: int | None
    lam_decay_steps: int | None

    def check_schedule(self) -> None:
        """Checks the two numbers of steps.

        Raises:
            ValueError: If one is below 1.
        """
        for name in ("lam_warmup_steps", "lam_decay_steps"):
            steps = getattr(self, name)
            if steps is not None and steps < 1:
                raise ValueError(f"{type(self).__name__}.{name} is {steps}; it has to be at least 1, or null")

    def at(self: M, step: int) -> M:
        """See `Method.at`. The decay begins after the warm-up."""
        warmup = self.lam_warmup_steps or 0
        scale = min(1.0, step / warmup) if warmup else 1.0
        if self.lam_decay_steps is not None:
            scale *= max(0.0, 1 - max(0, step - warmup) / self.lam_decay_steps)
        return replace(cast(Any, self), lam=self.lam * scale, lam_warmup_steps=None, lam_decay_steps=None)
