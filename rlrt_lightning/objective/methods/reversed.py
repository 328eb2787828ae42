"""RLRT, and the methods that weigh each token the opposite way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from rlrt_lightning.objective.methods.base import Context, Credit, Method, asymmetry_of
from rlrt_lightning.objective.ratios import bounded_ratio


class _TeacherWeighted(Method):
    """What RLRT and RLSD share: Eq. 7 around a weight that is a power of P_S / P_T."""

    lam: float
    eps_w: float
    gated: bool
    lam_decay_steps: int | None

    exponent: ClassVar[int]
    """Of P_S / P_T in the weight on roll-outs with A > 0: 1 goes with the student, -1 with the teacher."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not 0 <= self.lam <= 1:
            raise ValueError(f"{name}.lam is {self.lam}; it has to be within 0 and 1")
        if not 0 <= self.eps_w <= 1:
            raise ValueError(f"{name}.eps_w is {self.eps_w}; it has to be within 0 and 1, or weights turn negative")
        if self.context == "none":
            raise ValueError(f"{name}.context is 'none'; without a context there is no teacher (take GRPO)")
        if self.lam_decay_steps is not None and self.lam_decay_steps < 1:
            raise ValueError(f"{name}.lam_decay_steps is {self.lam_decay_steps}; it has to be at least 1, or null")

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
        mask, advantage = mask.bool(), advantages[:, None]
        asymmetry = asymmetry_of(logp_student, logp_teacher, mask, has_context)

        # Eq. 6: w_t = exp(sign(A) D_t) = (P_S / P_T)^sign(A)
        weights = bounded_ratio(self.exponent * advantage.sign() * asymmetry)
        if self.gated:
            weights = torch.where(self.successful(rewards)[:, None], weights, 1.0)

        # Eq. 7: A_t = A [(1 - lam) + lam clip(w_t, 1 - eps_w, 1 + eps_w)]
        clipped = weights.clamp(1 - self.eps_w, 1 + self.eps_w)
        token_advantages = advantage * ((1 - self.lam) + self.lam * clipped)
        return Credit(torch.where(mask, token_advantages, 0.0), torch.where(mask, weights, 0.0), asymmetry)

    def uses_teacher(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """See `Method.uses_teacher`."""
        acts = (advantages != 0) & (self.lam > 0)
        return acts & self.successful(rewards) if self.gated else acts

    def at(self, step: int) -> Method:
        """See `Method.at`."""
        if self.lam_decay_steps is None:
            return self
        return replace(cast(Any, self), lam=self.lam * max(0.0, 1 - step / self.lam_decay_steps), lam_decay_steps=None)


@dataclass(frozen=True)
class RLRT(_TeacherWeighted):
    """RLVR with Reversed Teacher (arXiv:2605.10781, Eqs. 6 and 7).

    On roll-outs that succeeded, tokens where the student went against the teacher get more credit.

    Args:
        lam: Strength of the token weight, within 0 and 1; 0 is GRPO. A token's advantage A changes by at most
            lam * eps_w * |A|.
        eps_w: The weight is clipped to 1 - eps_w .. 1 + eps_w. The paper: 1.0 for base models, 0.5 for
            instruction-tuned, 0.2 for thinking-tuned ones.
        gated: Act on successful roll-outs only. Off is the paper's RLRT-all, which it found to collapse.
        success_threshold: A reward of at least this counts as success (r = 1).
        context: What the teacher sees besides the prompt: "sibling", another successful roll-out of the group,
            "solution", the reference solution, "answer", the ground-truth answer, or "feedback", what the verifier said
            of the roll-out.
        normalize_std: Divide advantages by the group's standard deviation.
        lam_decay_steps: Let lam fall linearly to 0 over this many optimiser steps; null keeps it constant.
    """

    lam: float = 0.5
    eps_w: float = 1.0
    gated: bool = True
    success_threshold: float = 0.5
    context: Context = "sibling"
    normalize_std: bool = True
    lam_decay_steps: int | None = None

    exponent: ClassVar[int] = 1


@dataclass(frozen=True)
class RLSD(_TeacherWeighted):
    """RLVR with self-distillation (arXiv:2604.03128).

    Tokens that the teacher, who knows the answer, finds likelier get more credit on good roll-outs and less blame on
    bad ones.

    Args:
        lam: Strength of the token weight, within 0 and 1; 0 is GRPO.
        eps_w: The weight is clipped to 1 - eps_w .. 1 + eps_w; the paper's comparison has 0.2.
        gated: Act on successful roll-outs only. On, with a "sibling" as context, is "teacher-predicted" of
            arXiv:2605.10781, Fig. 1a.
        success_threshold: A reward of at least this counts as success (r = 1).
        context: What the teacher sees besides the prompt: "answer", the ground-truth answer, "sibling", another
            successful roll-out of the group, "solution", the reference solution, or "feedback", what the verifier said
            of the roll-out.
        normalize_std: Divide advantages by the group's standard deviation.
        lam_decay_steps: Let lam fall linearly to 0 over this many optimiser steps; null keeps it constant.
    """

    lam: float = 0.5
    eps_w: float = 0.2
    gated: bool = False
    success_threshold: float = 0.5
    context: Context = "answer"
    normalize_std: bool = True
    lam_decay_steps: int | None = None

    exponent: ClassVar[int] = -1
