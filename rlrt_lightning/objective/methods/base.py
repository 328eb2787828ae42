"""The interface of a method: what it requires (`Needs`), its inputs (`Signals`) and its output (`Credit`).

Shapes: N rollouts; T is the length of the longest response. A mask [N, T] is true at response tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rlrt_lightning.objective.gate import EntropyGate
from rlrt_lightning.objective.ratios import log_ratio, widened
from rlrt_lightning.objective.surrogate import Aggregation

Context = Literal["none", "sibling", "solution", "answer", "feedback", "sibling_or_solution"]
"""What the teacher sees besides the prompt: nothing, another successful rollout of the group, the reference solution,
the ground-truth answer, the verifier's message about the rollout itself, or another successful rollout if there is one
and the reference solution otherwise."""

Remark = Literal["none", "verdict", "feedback"]
"""What follows the context and the template: nothing, whether the rollout itself is correct, or the verifier's message
about it."""


@dataclass(frozen=True)
class TeacherWeights:
    """Schedule of the teacher's weights: the policy's weights as of the last refresh.

    By default (a refresh after every epoch, no moving average), the teacher is the policy that generated the rollouts
    and stores no weights.

    Args:
        every_n_epochs: Number of epochs between refreshes; None keeps the initial weights.
        ema_decay: A refresh sets teacher = ema_decay * teacher + (1 - ema_decay) * policy; 0 copies the policy.

    Raises:
        ValueError: If a setting is out of range, or a decay is set without refreshes.
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
            return "the weights of the policy that generates the rollouts"
        if self.every_n_epochs is None:
            return "the initial weights"
        often = "every epoch" if self.every_n_epochs == 1 else f"every {self.every_n_epochs} epochs"
        if self.ema_decay == 0:
            return f"a copy of the policy's weights, refreshed {often}"
        return f"a moving average of the policy's weights (decay {self.ema_decay}), updated {often}"

    @property
    def kind(self) -> Literal["policy", "initial", "own"]:
        """The policy's current weights, its initial weights, or a separate copy that follows the policy."""
        if self.every_n_epochs is None:
            return "initial"
        return "policy" if self.every_n_epochs == 1 and self.ema_decay == 0 else "own"

    def due(self, epoch: int) -> bool:
        """Whether the teacher is refreshed after an epoch, counted from 0."""
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0


@dataclass(frozen=True)
class Needs:
    """What a method requires besides rewards and log-probs.

    Args:
        entropy: The teacher's entropy at each token (`Signals.teacher_entropy`).
        top_k: Number of the student's most likely tokens that a divergence compares with the teacher
            (`Credit.distillation`); 0 for no divergence, None for the whole vocabulary.
        teacher: The teacher's weights, unless `teacher_refresh` is set.
        remark: What the teacher's prompt says about the rollout itself, after the context.
        wrong_siblings: The teacher also scores each rollout with up to this many failed rollouts of its group as
            contexts, one at a time (`Signals.logp_teacher_wrong`). Rollouts without a context or without a failed
            sibling are then not scored at all.
        thoughts: Which tokens are thinking (`Signals.thoughts`).
        aggregation: The only `model.aggregation` that fits the method's loss; None for any.
    """

    entropy: bool = False
    top_k: int | None = 0
    teacher: TeacherWeights = TeacherWeights()
    remark: Remark = "none"
    wrong_siblings: int = 0
    thoughts: bool = False
    aggregation: Aggregation | None = None


@dataclass(frozen=True, eq=False)
class Signals:
    """The inputs of a method: an epoch's rollouts.

    Args:
        advantages: Group advantage A of each rollout, [N].
        rewards: The verifier's reward of each rollout, [N].
        logp_student: log P_S of each response token, nats, [N, T].
        logp_teacher: log P_T of each response token, nats, [N, T]; ignored for rollouts without a context.
        mask: True at response tokens, bool [N, T].
        has_context: True for rollouts whose teacher had a context, bool [N].
        teacher_entropy: H(P_T), nats, [N, T]; ignored for rollouts without a context. None unless `Needs.entropy`.
        logp_teacher_wrong: log P_T with each of C failed siblings as the context, nats, [N, C, T]. None unless
            `Needs.wrong_siblings`.
        wrong_valid: True for the failed siblings that exist, bool [N, C]; values of others are ignored.
        thoughts: True at tokens inside thinking tags, bool [N, T]. None unless `Needs.thoughts`.
        gate_open: Whether the method's gate (`Method.new_gate`) is open in this epoch.
        sum_over_ranks: Sums a tensor over all ranks, for means over the rollouts of all ranks.
    """

    advantages: Tensor
    rewards: Tensor
    logp_student: Tensor
    logp_teacher: Tensor
    mask: Tensor
    has_context: Tensor
    teacher_entropy: Tensor | None = None
    logp_teacher_wrong: Tensor | None = None
    wrong_valid: Tensor | None = None
    thoughts: Tensor | None = None
    gate_open: bool = True
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values

    @property
    def asymmetry(self) -> Tensor:
        """D_t = log P_S^t(y_t) - log P_T^t(y_t) (arXiv:2605.10781, Sec. 3), stop-gradient: nats, [N, T], 0 for rollouts
        without a context."""
        return log_ratio(self.logp_student, self.logp_teacher, self.mask & self.has_context[:, None]).detach()

    @property
    def has_contrast(self) -> Tensor:
        """True for rollouts that have a context and at least one failed sibling, bool [N].

        Raises:
            ValueError: If the scores with failed siblings are missing.
        """
        if self.wrong_valid is None:
            raise ValueError("the method needs logp_teacher_wrong and wrong_valid, the scores with failed siblings")
        return self.has_context & self.wrong_valid.bool().any(-1)

    @property
    def contrast(self) -> Tensor:
        """e_t = log P_T(y_t | successful sibling) - log mean_k P_T(y_t | failed sibling k) (arXiv:2606.11709),
        stop-gradient: nats, [N, T], 0 for rollouts without a contrast."""
        found = self.has_contrast[:, None]
        assert self.logp_teacher_wrong is not None
        assert self.wrong_valid is not None
        valid = self.wrong_valid.bool()
        wrong = widened(self.logp_teacher_wrong).masked_fill(~valid[..., None], -torch.inf)
        count = valid.sum(-1, keepdim=True).clamp(min=1)
        mean = wrong.logsumexp(1) - count.to(wrong.dtype).log()
        return log_ratio(self.logp_teacher, mean, self.mask & found).detach()


@dataclass(frozen=True)
class DivergenceSettings:
    """How a divergence to the teacher enters the loss.

    Args:
        alpha: 0 is KL(teacher || student), 1 is KL(student || teacher), values between are generalized Jensen-Shannon
            divergences.
        importance_cap: Upper bound of each token's importance weight P_new / P_old.
    """

    alpha: float
    importance_cap: float


@dataclass(frozen=True, eq=False)
class Credit:
    """The output of a method. Tensors are [N, T] and 0 outside the mask, except `counted`.

    The loss of a token is -min(rho A_t, clip(rho) A_t) + distillation * divergence - entropy_bonus * entropy, averaged
    over the tokens of all `counted` rollouts.

    Args:
        advantages: Token advantages A_t.
        weights: Token weights w_t before clipping; 1 where the method does not apply.
        asymmetry: D_t = log P_S^t(y_t) - log P_T^t(y_t), nats; 0 for rollouts without a context.
        weight_bounds: The range to which w_t is clipped in A_t; None for no clipping.
        distillation: Weight of the divergence between student and teacher; None for no divergence.
        divergence: Settings of the divergence; None for no divergence.
        entropy_bonus: Coefficient of the policy's entropy; None for no bonus.
        counted: True for rollouts whose tokens are included in the mean, bool [N]; None for all.
        contrast: e_t (`Signals.contrast`), nats; 0 for rollouts without one. None if the method has none.
        selected: True at the tokens that have a mean of their own, as in `two_path_surrogate`, bool; None for one mean.
        eta: Factor of that mean.

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
    contrast: Tensor | None = None
    selected: Tensor | None = None
    eta: float = 1.0

    def __post_init__(self) -> None:
        if (self.distillation is None) != (self.divergence is None):
            raise ValueError("Credit.distillation and Credit.divergence have to be given together, or not at all")

    @classmethod
    def plain(cls, signals: Signals) -> Credit:
        """The credit of GRPO: A_t = A at every token, with weight 1."""
        ones = signals.mask.to(signals.logp_student.dtype)
        return cls(signals.advantages[:, None] * ones, ones, signals.asymmetry)

    @property
    def trains(self) -> Tensor:
        """Rollouts that have a gradient: bool [N]."""
        parts = (self.advantages, self.distillation, self.entropy_bonus)
        return torch.stack([p.ne(0).any(-1) for p in parts if p is not None]).any(0)

    def without(self, rows: Tensor) -> Credit:
        """A copy without gradients from the rollouts selected by `rows`, bool [N]; they still count in the mean."""

        def cleared(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.masked_fill(rows[:, None], 0.0)

        return replace(
            self,
            advantages=self.advantages.masked_fill(rows[:, None], 0.0),
            distillation=cleared(self.distillation),
            entropy_bonus=cleared(self.entropy_bonus),
        )


class Method(ABC):
    """Turns group advantages into token credit: frozen settings and pure tensor functions.

    A custom method is a frozen dataclass that defines `normalize_std`, `context` and `success_threshold` as settings or
    class attributes, and implements `credit`. It overrides `needs` if it requires more than the log-probs of a teacher
    with the policy's current weights.
    """

    normalize_std: bool
    context: Context = "none"
    success_threshold: float = 0.5

    @property
    def needs(self) -> Needs:
        """What the method requires; may depend on its settings."""
        return Needs()

    @abstractmethod
    def credit(self, signals: Signals) -> Credit:
        """Distributes the advantages over the tokens. No gradient flows through the credit.

        Args:
            signals: The rollouts' advantages, rewards and log-probs.
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
        """`credit` from tensors; dtypes are preserved.

        Args:
            advantages: Group advantage A of each rollout, [N].
            rewards: The verifier's reward of each rollout, [N].
            logp_student: log P_S of each response token, nats, [N, T].
            logp_teacher: log P_T of each response token, nats, [N, T]; ignored for rollouts without a context.
            mask: True at response tokens, [N, T].
            has_context: True for rollouts whose teacher had a context, [N].
            more: Other fields of `Signals`, such as `teacher_entropy`.
        """
        mask, has_context = mask.bool(), has_context.bool()
        return self.credit(Signals(advantages, rewards, logp_student, logp_teacher, mask, has_context, **more))

    def successful(self, rewards: Tensor) -> Tensor:
        """Rollouts that count as r = 1: bool [N]."""
        return rewards >= self.success_threshold

    def uses_teacher(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """Rollouts whose credit depends on the teacher; only these are scored. bool [N]."""
        return torch.zeros_like(rewards, dtype=torch.bool)

    def may_train(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """Rollouts that may get a gradient; `data.rescore` recomputes the log-probs of these only. bool [N]."""
        return (advantages != 0) | self.uses_teacher(advantages, rewards)

    def shape_rewards(self, rewards: Tensor, groups: Tensor, texts: Sequence[str]) -> Tensor:
        """The rewards from which the advantages are computed.

        Args:
            rewards: The verifier's reward of each rollout, [N].
            groups: Prompt index of each rollout, [N].
            texts: The N completions.
        """
        return rewards

    def new_gate(self) -> EntropyGate | None:
        """A gate in its initial state, which the module steps once an epoch with the median of the teacher's entropy
        and saves in checkpoints; None if the method has none. A method with a gate needs entropies (`Needs`)."""
        return None

    def at(self, step: int) -> Method:
        """The method after `step` optimizer steps, for settings that change during training."""
        return self
