"""Token credit: how each method spreads a roll-out's advantage A over its tokens.

All methods are one sentence: *token weight*, *gate* and *context* of the teacher.

| method | context of the teacher | token weight w_t | acts on |
| --- | --- | --- | --- |
| `GRPO` | none | 1 | - |
| `RLRT` | another correct roll-out of the group | (P_S / P_T)^sign(A) | correct roll-outs |
| `RLRT(gated=False)` (the paper's RLRT-all) | same | same | all roll-outs |
| `RLSD` | the ground-truth answer | (P_T / P_S)^sign(A) | all roll-outs |
| `RLSD(gated=True, context="sibling")` (teacher-predicted) | another correct roll-out | same | correct roll-outs |

P_S is the policy (the student), P_T the same model that also sees the context (the teacher).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

Context = Literal["none", "sibling", "answer"]


@dataclass(frozen=True)
class Credit:
    """What a method makes of a batch of roll-outs. All [N, T], 0 at masked positions.

    Args:
        advantages: Token advantages A_t.
        weights: w_t before it is clipped; 1 where the method does not act.
        asymmetry: D_t = log P_S(y_t) - log P_T(y_t), in nats; 0 where there is no context.
    """

    advantages: Tensor
    weights: Tensor
    asymmetry: Tensor


class Method(ABC):
    """How group advantages become token advantages. Frozen settings and a pure function of tensors."""

    normalize_std: bool
    context: Context = "none"
    success_threshold: float = 0.5

    @abstractmethod
    def __call__(
        self,
        advantages: Tensor,
        rewards: Tensor,
        logp_student: Tensor,
        logp_teacher: Tensor,
        mask: Tensor,
        has_context: Tensor,
    ) -> Credit:
        """Spreads the advantages over the tokens. No gradient flows through the credit.

        Args:
            advantages: Group advantage A of each roll-out, [N].
            rewards: Reward of each roll-out, [N].
            logp_student: log P_S of each response token, nats, [N, T].
            logp_teacher: log P_T of each response token, nats, [N, T]; read only where there is a context.
            mask: True at response tokens, [N, T].
            has_context: True where the teacher had a context, [N].
        """

    def successful(self, rewards: Tensor) -> Tensor:
        """Which roll-outs count as r = 1: bool [N]."""
        return rewards >= self.success_threshold

    def uses_teacher(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """Which roll-outs the teacher can change the credit of, so that only those are scored: bool [N]."""
        return torch.zeros_like(rewards, dtype=torch.bool)

    def at(self, step: int) -> Method:
        """The method as it is after `step` optimiser steps (for settings that decay)."""
        return self


def _asymmetry(logp_student: Tensor, logp_teacher: Tensor, mask: Tensor, has_context: Tensor) -> Tensor:
    """D_t = log P_S - log P_T (arXiv:2605.10781, Sec. 3), stop-gradient; where there is no context the log-probs are
    not read at all: they may hold anything."""
    scored = mask.bool() & has_context.bool()[:, None]
    return torch.where(scored, logp_student - logp_teacher, 0.0).detach()


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
        return Credit(advantages[:, None] * ones, ones, _asymmetry(logp_student, logp_teacher, mask, has_context))


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
            raise ValueError(f"{name}.context is 'none'; it has to be 'sibling' or 'answer' (or take GRPO)")
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
        asymmetry = _asymmetry(logp_student, logp_teacher, mask, has_context)

        # Eq. 6: w_t = exp(sign(A) D_t) = (P_S / P_T)^sign(A)
        weights = torch.exp(self.exponent * advantage.sign() * asymmetry)
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
        context: What the teacher sees besides the prompt: "sibling", another successful roll-out of the group, or
            "answer", the ground-truth answer.
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
        context: What the teacher sees besides the prompt: "answer", the ground-truth answer, or "sibling", another
            successful roll-out of the group.
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
