"""What a method is, and what it makes of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rlrt_lightning.objective.ratios import log_ratio

Context = Literal["none", "sibling", "solution", "answer", "feedback"]
"""What the teacher sees besides the prompt: nothing, another successful roll-out of the group, the reference solution,
the ground-truth answer, or what the verifier said of this very roll-out."""


@dataclass(frozen=True)
class Credit:
    """What a method makes of a batch of roll-outs. All [N, T] and 0 at masked positions, but for `counted`.

    The loss of a token is -min(rho A_t, clip(rho) A_t) + distillation * divergence - entropy_bonus * entropy, and its
    mean is taken over the tokens of the roll-outs that count.

    Args:
        advantages: Token advantages A_t.
        weights: w_t before it is clipped; 1 where the method does not act.
        asymmetry: D_t = log P_S(y_t) - log P_T(y_t), in nats; 0 where there is no context.
        distillation: Weight of the divergence between student and teacher; None for no such loss.
        entropy_bonus: Coefficient of the policy's entropy; None for no such bonus.
        counted: Which roll-outs count in the mean, bool [N]; None for all.
    """

    advantages: Tensor
    weights: Tensor
    asymmetry: Tensor
    distillation: Tensor | None = None
    entropy_bonus: Tensor | None = None
    counted: Tensor | None = None

    @property
    def trains(self) -> Tensor:
        """Which roll-outs have a gradient: bool [N]."""
        parts = (self.advantages, self.distillation, self.entropy_bonus)
        return torch.stack([p.ne(0).any(-1) for p in parts if p is not None]).any(0)

    def without(self, rows: Tensor) -> Credit:
        """The same with no gradient from some roll-outs, bool [N]; they still count in the mean."""

        def cleared(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.masked_fill(rows[:, None], 0.0)

        return replace(
            self,
            advantages=self.advantages.masked_fill(rows[:, None], 0.0),
            distillation=cleared(self.distillation),
            entropy_bonus=cleared(self.entropy_bonus),
        )


class Method(ABC):
    """How group advantages become token credit. Frozen settings and pure functions of tensors.

    A method of your own is a frozen dataclass with `normalize_std`, `context` and `success_threshold` among its
    settings or class attributes, and `__call__`.
    """

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
            rewards: Reward of each roll-out as the verifier gave it, [N].
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

    def may_train(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """Which rollouts may get a gradient, so that `data.rescore` computes the policy's log-probs of these alone:
        bool [N]."""
        return (advantages != 0) | self.uses_teacher(advantages, rewards)

    def shape_rewards(self, rewards: Tensor, groups: Tensor, texts: Sequence[str]) -> Tensor:
        """The rewards that the advantages are computed from.

        Args:
            rewards: Reward of each roll-out as the verifier gave it, [N].
            groups: Which prompt each roll-out answers, [N].
            texts: The responses, N of them.
        """
        return rewards

    def at(self, step: int) -> Method:
        """The method as it is after `step` optimiser steps (for settings that change)."""
        return self


def asymmetry_of(logp_student: Tensor, logp_teacher: Tensor, mask: Tensor, has_context: Tensor) -> Tensor:
    """D_t = log P_S - log P_T (arXiv:2605.10781, Sec. 3), stop-gradient, [N, T]; where there is no context the
    log-probs are not read at all: they may hold anything."""
    return log_ratio(logp_student, logp_teacher, mask.bool() & has_context.bool()[:, None]).detach()
