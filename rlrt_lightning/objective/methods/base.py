"""What a method asks of an epoch (`Needs`), what it gets (`Signals`), and what it makes of that (`Credit`).

Shapes: N rollouts, T the longest response; a mask [N, T] is true at response tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rlrt_lightning.objective.ratios import log_ratio

Context = Literal["none", "sibling", "solution", "answer", "feedback"]
"""What the teacher sees besides the prompt: nothing, another successful rollout of the group, the reference solution,
the ground-truth answer, or what the verifier said of the rollout itself."""


@dataclass(frozen=True)
class TeacherWeights:
    """Whose weights the teacher has: the policy's as of its last refresh.

    Refreshed after every epoch without a moving average (the default), the teacher is the policy that drew the rollouts
    and keeps no weights of its own.

    Args:
        every_n_epochs: Refresh after every so many epochs; None never does: the initial weights.
        ema_decay: At a refresh the teacher becomes ema_decay * teacher + (1 - ema_decay) * policy; 0 copies the policy.

    Raises:
        ValueError: If a setting is out of range, or there is a decay and no refresh.
    """

    every_n_epochs: int | None = 1
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.every_n_epochs is not None and self.every_n_epochs < 1:
            raise ValueError(f"every_n_epochs is {self.every_n_epochs}; it has to be at least 1, or null")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; it has to be from 0 to below 1")
        if self.every_n_epochs is None and self.ema_decay > 0:
            raise ValueError(
                f"ema_decay is {self.ema_decay}, but every_n_epochs is null, so the teacher is never refreshed; set "
                "every_n_epochs, or ema_decay to 0"
            )

    def __str__(self) -> str:
        if self.kind == "policy":
            return "the weights of the policy that draws the rollouts"
        if self.every_n_epochs is None:
            return "the initial weights"
        often = "every epoch" if self.every_n_epochs == 1 else f"every {self.every_n_epochs} epochs"
        if self.ema_decay == 0:
            return f"a copy of the policy's weights, refreshed {often}"
        return f"a moving average of the policy's weights (decay {self.ema_decay}), updated {often}"

    @property
    def kind(self) -> Literal["policy", "initial", "own"]:
        """The policy's weights, those that it began with, or a copy that follows the policy."""
        if self.every_n_epochs is None:
            return "initial"
        return "policy" if self.every_n_epochs == 1 and self.ema_decay == 0 else "own"

    def due(self, epoch: int) -> bool:
        """Whether the teacher is refreshed after an epoch, counted from 0."""
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0


@dataclass(frozen=True)
class Needs:
    """What a method asks of an epoch besides rewards and log-probs.

    Args:
        entropy: The teacher's entropy at each token (`Signals.teacher_entropy`).
        top_k: How many of the student's likeliest tokens are compared with the teacher's log-probs of them, for a
            divergence (`Credit.distillation`); 0 for none, None for the whole vocabulary.
        teacher: Whose weights the teacher has, unless the user's `teacher_refresh` says otherwise.
    """

    entropy: bool = False
    top_k: int | None = 0
    teacher: TeacherWeights = TeacherWeights()


@dataclass(frozen=True, eq=False)
class Signals:
    """What a method gets of an epoch's rollouts.

    Args:
        advantages: Group advantage A of each rollout, [N].
        rewards: Reward of each rollout as the verifier gave it, [N].
        logp_student: log P_S of each response token, nats, [N, T].
        logp_teacher: log P_T of each response token, nats, [N, T]; anything where there is no context.
        mask: True at response tokens, bool [N, T].
        has_context: True where the teacher had a context, bool [N].
        teacher_entropy: H(P_T), nats, [N, T]; anything where there is no context; None unless the method needs it.
        sum_over_ranks: Adds up a tensor over all ranks, for means over the rollouts of all of them.
    """

    advantages: Tensor
    rewards: Tensor
    logp_student: Tensor
    logp_teacher: Tensor
    mask: Tensor
    has_context: Tensor
    teacher_entropy: Tensor | None = None
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values

    @property
    def asymmetry(self) -> Tensor:
        """D_t = log P_S - log P_T (arXiv:2605.10781, Sec. 3), nats, stop-gradient, [N, T]; 0 without a context, where
        the log-probs are not read."""
        return log_ratio(self.logp_student, self.logp_teacher, self.mask & self.has_context[:, None]).detach()


@dataclass(frozen=True)
class DivergenceSettings:
    """How a divergence to the teacher enters the loss.

    Args:
        alpha: Which divergence: 0 is KL(teacher || student), 1 is KL(student || teacher), between them the generalised
            Jensen-Shannon divergence.
        importance_cap: Upper limit of each token's weight P_new / P_old.
    """

    alpha: float
    importance_cap: float


@dataclass(frozen=True, eq=False)
class Credit:
    """What a method makes of an epoch's rollouts. Tensors are [N, T] and 0 at masked positions, except `counted`.

    The loss of a token is -min(rho A_t, clip(rho) A_t) + distillation * divergence - entropy_bonus * entropy; its mean
    is taken over the tokens of the rollouts that count.

    Args:
        advantages: Token advantages A_t.
        weights: w_t before it is clipped; 1 where the method does not act.
        asymmetry: D_t = log P_S(y_t) - log P_T(y_t), in nats; 0 where there is no context.
        weight_bounds: The range that A_t clips w_t to; None for no clip.
        distillation: Weight of the divergence between student and teacher; None for no such loss.
        divergence: Settings of that divergence; None for no such loss.
        entropy_bonus: Coefficient of the policy's entropy; None for no such bonus.
        counted: Which rollouts count in the mean, bool [N]; None for all.

    Raises:
        ValueError: If only one of `distillation` and `divergence` is given.
    """

    advantages: Tensor
    weights: Tensor
    asymmetry: Tensor
    weight_bounds: tuple[float, float] | None = None
    distillation: Tensor | None = None
    divergence: DivergenceSettings | None = None
    entropy_bonus: Tensor | None = None
    counted: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.distillation is None) != (self.divergence is None):
            raise ValueError("Credit.distillation and Credit.divergence have to be given together, or neither")

    @classmethod
    def plain(cls, signals: Signals) -> Credit:
        """GRPO's: A at each token of a rollout, with weight 1."""
        ones = signals.mask.to(signals.logp_student.dtype)
        return cls(signals.advantages[:, None] * ones, ones, signals.asymmetry)

    @property
    def trains(self) -> Tensor:
        """Which rollouts have a gradient: bool [N]."""
        parts = (self.advantages, self.distillation, self.entropy_bonus)
        return torch.stack([p.ne(0).any(-1) for p in parts if p is not None]).any(0)

    def without(self, rows: Tensor) -> Credit:
        """The same with no gradient from some rollouts, bool [N]; they still count in the mean."""

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
    settings or class attributes, `credit`, and `needs` where it needs more than log-probs of a teacher with the
    policy's current weights.
    """

    normalize_std: bool
    context: Context = "none"
    success_threshold: float = 0.5

    @property
    def needs(self) -> Needs:
        """What the method asks of an epoch; may depend on its settings."""
        return Needs()

    @abstractmethod
    def credit(self, signals: Signals) -> Credit:
        """Spreads the advantages over the tokens. No gradient flows through the credit.

        Args:
            signals: What is known of the rollouts.
        """

    def __call__(
        self,
        advantages: Tensor,
        rewards: Tensor,
        logp_student: Tensor,
        logp_teacher: Tensor,
        mask: Tensor,
        has_context: Tensor,
        **more: Any,
    ) -> Credit:
        """`credit` from tensors; dtypes are kept.

        Args:
            advantages: Group advantage A of each rollout, [N].
            rewards: Reward of each rollout as the verifier gave it, [N].
            logp_student: log P_S of each response token, nats, [N, T].
            logp_teacher: log P_T of each response token, nats, [N, T]; read only where there is a context.
            mask: True at response tokens, [N, T].
            has_context: True where the teacher had a context, [N].
            more: Further fields of `Signals`, such as `teacher_entropy`.
        """
        mask, has_context = mask.bool(), has_context.bool()
        return self.credit(Signals(advantages, rewards, logp_student, logp_teacher, mask, has_context, **more))

    def successful(self, rewards: Tensor) -> Tensor:
        """Which rollouts count as r = 1: bool [N]."""
        return rewards >= self.success_threshold

    def uses_teacher(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """Which rollouts the teacher can change the credit of, so that only those are scored: bool [N]."""
        return torch.zeros_like(rewards, dtype=torch.bool)

    def may_train(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """Which rollouts may get a gradient, so that `data.rescore` computes the policy's log-probs of these alone:
        bool [N]."""
        return (advantages != 0) | self.uses_teacher(advantages, rewards)

    def shape_rewards(self, rewards: Tensor, groups: Tensor, texts: Sequence[str]) -> Tensor:
        """The rewards that the advantages are computed from.

        Args:
            rewards: Reward of each rollout as the verifier gave it, [N].
            groups: Which prompt each rollout answers, [N].
            texts: The responses, N of them.
        """
        return rewards

    def at(self, step: int) -> Method:
        """The method after `step` optimizer steps, for settings that change during training."""
        return self
