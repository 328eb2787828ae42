"""SDPO and SRPO: the student is pulled to the teacher's whole distribution, not only weighted at the sampled token."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlrt_lightning.objective.divergences import dynamic_weights
from rlrt_lightning.objective.methods.base import Context, Credit, Method, asymmetry_of


class Distilling(Method):
    """What SDPO and SRPO share: a divergence to the teacher (`rlrt_lightning.divergence`) as the loss of some
    roll-outs, each token times min(P_new / P_old, importance_cap)."""

    alpha: float
    top_k: int | None
    importance_cap: float

    @abstractmethod
    def __call__(
        self,
        advantages: Tensor,
        rewards: Tensor,
        logp_student: Tensor,
        logp_teacher: Tensor,
        mask: Tensor,
        has_context: Tensor,
        teacher_entropy: Tensor | None = None,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums,
    ) -> Credit:
        """See `Method.__call__`; besides:

        Args:
            teacher_entropy: H(P_T), nats, [N, T]; read only where there is a context.
            sum_over_ranks: Adds up a tensor of all ranks, for what is a mean over an epoch's roll-outs on all of them.
        """

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"{name}.alpha is {self.alpha}; it has to be within 0 and 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"{name}.top_k is {self.top_k}; it has to be at least 1, or null for all tokens")
        if self.importance_cap <= 0:
            raise ValueError(f"{name}.importance_cap is {self.importance_cap}; it has to be above 0")
        if self.context == "none":
            raise ValueError(f"{name}.context is 'none'; without a context there is no teacher to learn from")


@dataclass(frozen=True)
class SDPO(Distilling):
    """Self-distillation policy optimisation (arXiv:2601.20802): no surrogate; every roll-out that has a context is
    pulled to what the teacher would have said. The mean is taken over the tokens of these roll-outs.

    Args:
        alpha: Which divergence: 0 is KL(teacher || student), 1 is KL(student || teacher), between them the generalised
            Jensen-Shannon divergence.
        top_k: Compare the student's k likeliest tokens, and the rest as one bucket; null compares the whole vocabulary,
            whose log-probs are then kept for each token.
        importance_cap: Upper limit of each token's importance weight P_new / P_old.
        context: What the teacher sees besides the prompt: "sibling", another successful roll-out of the group,
            "solution", "answer" or "feedback".
        success_threshold: A reward of at least this counts as success: only such a roll-out can be shown to a sibling.
    """

    alpha: float = 0.5
    top_k: int | None = 100
    importance_cap: float = 2.0
    context: Context = "sibling"
    success_threshold: float = 0.5
    normalize_std = False

    def __call__(
        self,
        advantages: Tensor,
        rewards: Tensor,
        logp_student: Tensor,
        logp_teacher: Tensor,
        mask: Tensor,
        has_context: Tensor,
        teacher_entropy: Tensor | None = None,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums,
    ) -> Credit:
        """See `Method.__call__`."""
        ones = mask.to(logp_student.dtype)
        pulled = ones * has_context.bool()[:, None]
        asymmetry = asymmetry_of(logp_student, logp_teacher, mask, has_context)
        return Credit(torch.zeros_like(ones), ones, asymmetry, distillation=pulled, counted=has_context.bool())

    def uses_teacher(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """See `Method.uses_teacher`."""
        return torch.ones_like(rewards, dtype=torch.bool)


@dataclass(frozen=True)
class SRPO(Distilling):
    """Sample-routed policy optimisation (arXiv:2604.02288): what succeeded is reinforced by GRPO, what failed is
    corrected by the teacher.

    A roll-out that failed and has a context gets SDPO's loss, each token times exp(-beta H(P_T)) brought to a mean of 1
    over these tokens; every other one gets GRPO's. One mean is taken over the tokens of both.

    Args:
        beta: How much a hesitating teacher counts less; 0 counts all tokens the same.
        alpha: Which divergence: 0 is KL(teacher || student), 1 is KL(student || teacher), between them the generalised
            Jensen-Shannon divergence.
        top_k: Compare the student's k likeliest tokens, and the rest as one bucket; null compares the whole vocabulary,
            whose log-probs are then kept for each token.
        importance_cap: Upper limit of each token's importance weight P_new / P_old in the divergence.
        context: What the teacher sees besides the prompt: "sibling", another successful roll-out of the group,
            "solution", "answer" or "feedback".
        success_threshold: A reward of at least this counts as success (r = 1).
        normalize_std: Divide advantages by the group's standard deviation.
    """

    beta: float = 1.0
    alpha: float = 0.5
    top_k: int | None = 100
    importance_cap: float = 2.0
    context: Context = "sibling"
    success_threshold: float = 0.5
    normalize_std: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 0:
            raise ValueError(f"SRPO.beta is {self.beta}; it has to be 0 or more")

    def __call__(
        self,
        advantages: Tensor,
        rewards: Tensor,
        logp_student: Tensor,
        logp_teacher: Tensor,
        mask: Tensor,
        has_context: Tensor,
        teacher_entropy: Tensor | None = None,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums,
    ) -> Credit:
        """See `Method.__call__`."""
        if teacher_entropy is None:
            raise ValueError("SRPO needs the teacher's entropy at each token")
        corrected = (~self.successful(rewards) & has_context.bool())[:, None] & mask.bool()
        ones = mask.to(logp_student.dtype)
        return Credit(
            torch.where(corrected, 0.0, advantages[:, None] * ones),
            ones,
            asymmetry_of(logp_student, logp_teacher, mask, has_context),
            distillation=dynamic_weights(teacher_entropy, corrected, self.beta, sum_over_ranks).detach(),
        )

    def uses_teacher(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """See `Method.uses_teacher`."""
        return ~self.successful(rewards)
