"""Base class of SDPO and SRPO, whose losses pull the student towards the teacher's distribution."""

from __future__ import annotations

from rlrt_lightning.objective.methods.base import DivergenceSettings, Method


class Distilling(Method):
    """A method whose loss has a divergence to the teacher (`rlrt_lightning.divergence`) on some rollouts."""

    alpha: float
    top_k: int | None
    importance_cap: float

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"{name}.alpha is {self.alpha}; it has to be from 0 to 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"{name}.top_k is {self.top_k}; it has to be at least 1, or null for all tokens")
        if self.importance_cap <= 0:
            raise ValueError(f"{name}.importance_cap is {self.importance_cap}; it has to be above 0")
        if self.context == "none":
            raise ValueError(f"{name}.context is 'none'; without a context there is no teacher to learn from")

    @property
    def divergence(self) -> DivergenceSettings:
        """How the divergence enters the loss."""
        return DivergenceSettings(self.alpha, self.importance_cap)
