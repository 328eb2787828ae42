"""GRPO, and GRPO with an entropy bonus."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from rlrt_lightning.objective.methods.base import Credit, Method, asymmetry_of


@dataclass(frozen=True)
class GRPO(Method):
    """Group advantages alone (arXiv:2402.03300): every token of a roll-out gets A.

    Args:
        normalize_std: Divide advantages by the group's standard deviation; off is Dr. GRPO (arXiv:2503.20783), the
            paper's baseline.
    """

    normalize_std: bool = False

    def __call__(
        self,
        advantages: Tensor,
        rewards: Tensor,
        logp_student: Tensor,
        logp_teacher: Tensor,
        mask: Tensor,
        has_context: Tensor,
    ) -> Credit:
        """See `Method.__call__`."""
        ones = mask.to(logp_student.dtype)
        return Credit(advantages[:, None] * ones, ones, asymmetry_of(logp_student, logp_teacher, mask, has_context))


@dataclass(frozen=True)
class EntropyBonus(GRPO):
    """GRPO that is paid for entropy: every token's loss is lowered by coef times the policy's entropy there
    (arXiv:2605.10781, Sec. 6.4). Roll-outs without an advantage are trained on too.

    Args:
        coef: Coefficient of the entropy in nats.
        normalize_std: Divide advantages by the group's standard deviation.
    """

    coef: float = 0.001

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise ValueError(f"EntropyBonus.coef is {self.coef}; it has to be 0 or more")

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Credit:
        """See `Method.__call__`."""
        credit = super().__call__(*args, **kwargs)
        return replace(credit, entropy_bonus=self.coef * credit.weights)

    def may_train(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """See `Method.may_train`."""
        return (advantages != 0) | (self.coef > 0)
