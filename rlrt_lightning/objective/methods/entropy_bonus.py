"""GRPO with an entropy bonus."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from rlrt_lightning.objective.methods.base import Credit, Signals
from rlrt_lightning.objective.methods.grpo import GRPO


@dataclass(frozen=True)
class EntropyBonus(GRPO):
    """GRPO with an entropy bonus: coef * the policy's entropy is subtracted from the loss of each token
    (arXiv:2605.10781, Sec. 6.4). Rollouts with zero advantage are trained on too.

    Args:
        coef: Coefficient of the entropy, per nat.
        normalize_std: Divide advantages by the group's standard deviation.
    """

    coef: float = 0.001

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"EntropyBonus.coef is {self.coef}; it has to be 0 or more")

    def credit(self, signals: Signals) -> Credit:
        """See `Method.credit`."""
        plain = super().credit(signals)
        return replace(plain, entropy_bonus=self.coef * plain.weights)

    def may_train(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """See `Method.may_train`."""
        return (advantages != 0) | (self.coef > 0)
