"""RLRT: on successful rollouts, tokens on which the student disagreed with the teacher get more credit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlrt_lightning.objective.methods.base import Context, Credit, Method, Signals
from rlrt_lightning.objective.ratios import bounded_ratio


@dataclass(frozen=True)
class RLRT(Method):
    """RLVR with Reversed Teacher (arXiv:2605.10781, Eqs. 6 and 7).

    On successful rollouts, tokens on which the student disagreed with the teacher get more credit.

    Args:
        lam: Strength of the token weight, from 0 to 1; 0 is GRPO. A token's advantage changes by at most
            lam * eps_w * |A|.
        eps_w: The token weight is clipped to [1 - eps_w, 1 + eps_w]. The paper uses 1.0 for base models, 0.5 for
            instruction-tuned and 0.2 for thinking-tuned models.
        gated: Apply the token weight to successful rollouts only. False is the paper's RLRT-all, which collapsed there.
        success_threshold: A reward of at least this counts as success (r = 1).
        context: What the teacher sees besides the prompt: "sibling" (another successful rollout of the group),
            "solution" (the reference solution), "answer" (the ground-truth answer) or "feedback" (the verifier's
            message about the rollout).
        normalize_std: Divide advantages by the group's standard deviation.
        lam_decay_steps: Decay lam linearly to 0 over this many optimizer steps; null keeps it constant.
    """

    lam: float = 0.5
    eps_w: float = 1.0
    gated: bool = True
    success_threshold: float = 0.5
    context: Context = "sibling"
    normalize_std: bool = True
    lam_decay_steps: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not 0 <= self.lam <= 1:
            raise ValueError(f"{name}.lam is {self.lam}; it has to be from 0 to 1")
        if not 0 <= self.eps_w <= 1:
            raise ValueError(f"{name}.eps_w is {self.eps_w}; it has to be from 0 to 1, so that 1 - eps_w is at least 0")
        if self.context == "none":
            raise ValueError(f"{name}.context is 'none', so there is no teacher; set a context, or use GRPO")
        if self.lam_decay_steps is not None and self.lam_decay_steps < 1:
            raise ValueError(f"{name}.lam_decay_steps is {self.lam_decay_steps}; it has to be at least 1, or null")

    def token_weights(self, sign: Tensor, asymmetry: Tensor) -> Tensor:
        """Eq. 6: w_t = exp(sign(A) * D_t) = (P_S^t(y_t) / P_T^t(y_t))^sign(A), [N, T].

        Args:
            sign: sign(A), [N, 1].
            asymmetry: D_t = log P_S^t(y_t) - log P_T^t(y_t), nats, [N, T].
        """
        return bounded_ratio(sign * asymmetry)

    def credit(self, signals: Signals) -> Credit:
        """Eq. 7: A_t = A * [(1 - lam) + lam * clip(w_t, 1 - eps_w, 1 + eps_w)] if r = 1, else A."""
        advantage, asymmetry = signals.advantages[:, None], signals.asymmetry
        weights = self.token_weights(advantage.sign(), asymmetry)
        if self.gated:  # w_t = 1 gives A_t = A
            weights = torch.where(self.successful(signals.rewards)[:, None], weights, 1.0)
        low, high = 1 - self.eps_w, 1 + self.eps_w
        token_advantages = advantage * ((1 - self.lam) + self.lam * weights.clamp(low, high))
        return Credit(
            torch.where(signals.mask, token_advantages, 0.0),
            torch.where(signals.mask, weights, 0.0),
            asymmetry,
            weight_bounds=(low, high),
        )

    def uses_teacher(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """See `Method.uses_teacher`."""
        weighted = (advantages != 0) & (self.lam > 0)
        return weighted & self.successful(rewards) if self.gated else weighted

    def at(self, step: int) -> RLRT:
        """See `Method.at`."""
        if self.lam_decay_steps is None:
            return self
        return replace(self, lam=self.lam * max(0.0, 1 - step / self.lam_decay_steps), lam_decay_steps=None)
