"""RLRT: on successful rollouts, tokens on which the student disagreed with the teacher get more credit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlrt_lightning.objective.methods.base import Context, Credit, Needs, Signals
from rlrt_lightning.objective.methods.rlcsd import WRONG_SIBLINGS
from rlrt_lightning.objective.methods.scheduled import Scheduled
from rlrt_lightning.objective.ratios import bounded_ratio


@dataclass(frozen=True)
class RLRT(Scheduled):
    """RLVR with Reversed Teacher (arXiv:2605.10781, Eqs. 6 and 7).

    On successful rollouts, tokens on which the student disagreed with the teacher get more credit.

    `contrast` is a variant of this project, not of the paper. A teacher that sees any sibling also changes its style,
    which is part of D_t. The variant replaces D_t by C_t = log mean_k P_T(y_t | failed sibling k) - log P_T(y_t |
    successful sibling), the negative of RLCSD's e_t: both sides see a sibling, so that the effect of style cancels. The
    sign is that of D_t: tokens that the successful sibling makes less likely get more credit.

    Args:
        lam: Strength of the token weight, from 0 to 1; 0 is GRPO with std (`GRPO(normalize_std=True)`). A token's
            advantage changes by at most lam * eps_w * |A|.
        eps_w: The token weight is clipped to [1 - eps_w, 1 + eps_w]. The paper uses 1.0 for base models, 0.5 for
            instruction-tuned and 0.2 for thinking-tuned models.
        gated: Apply the token weight to successful rollouts only. False is the paper's RLRT-all, which collapsed there.
        success_threshold: A reward of at least this counts as success (r = 1).
        context: What the teacher sees besides the prompt: "sibling" (another successful rollout of the group),
            "solution" (the reference solution), "answer" (the ground-truth answer) or "feedback" (the verifier's
            message about the rollout).
        normalize_std: Divide advantages by the group's standard deviation.
        contrast: Replace D_t by C_t (see above), with up to 4 failed siblings; requires the context "sibling". Rollouts
            without a failed sibling get weight 1.
        lam_warmup_steps: Raise lam linearly from 0 over this many optimizer steps; null starts with lam.
        lam_decay_steps: Decay lam linearly to 0 over this many optimizer steps, after its warm-up; null keeps it
            constant.
    """

    lam: float = 0.5
    eps_w: float = 1.0
    gated: bool = True
    success_threshold: float = 0.5
    context: Context = "sibling"
    normalize_std: bool = True
    contrast: bool = False
    lam_warmup_steps: int | None = None
    lam_decay_steps: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not 0 <= self.lam <= 1:
            raise ValueError(f"{name}.lam is {self.lam}; it has to be from 0 to 1")
        if not 0 <= self.eps_w <= 1:
            raise ValueError(f"{name}.eps_w is {self.eps_w}; it has to be from 0 to 1, so that 1 - eps_w is at least 0")
        if self.context == "none":
            raise ValueError(f"{name}.context is 'none', so there is no teacher; set a context, or use GRPO")
        if self.contrast and self.context != "sibling":
            raise ValueError(
                f"{name}.contrast compares siblings, but {name}.context is {self.context!r}; set 'sibling'"
            )
        self.check_schedule()

    @property
    def needs(self) -> Needs:
        """See `Method.needs`."""
        return Needs(wrong_siblings=WRONG_SIBLINGS if self.contrast else 0)

    def token_weights(self, sign: Tensor, asymmetry: Tensor) -> Tensor:
        """Eq. 6: w_t = exp(sign(A) * D_t) = (P_S^t(y_t) / P_T^t(y_t))^sign(A), [N, T].

        Args:
            sign: sign(A), [N, 1].
            asymmetry: D_t = log P_S^t(y_t) - log P_T^t(y_t), nats, [N, T]; C_t with `contrast`.
        """
        return bounded_ratio(sign * asymmetry)

    def acts_on(self, signals: Signals) -> Tensor:
        """True at tokens whose weight may differ from 1, bool [N, T]."""
        return signals.mask & self.successful(signals.rewards)[:, None] if self.gated else signals.mask

    def credit(self, signals: Signals) -> Credit:
        """Eq. 7: A_t = A * [(1 - lam) + lam * clip(w_t, 1 - eps_w, 1 + eps_w)] if r = 1, else A."""
        advantage, asymmetry = signals.advantages[:, None], signals.asymmetry
        contrast = signals.contrast if self.contrast else None
        weights = self.token_weights(advantage.sign(), asymmetry if contrast is None else -contrast)
        weights = torch.where(self.acts_on(signals), weights, 1.0)  # w_t = 1 gives A_t = A
        low, high = 1 - self.eps_w, 1 + self.eps_w
        token_advantages = advantage * ((1 - self.lam) + self.lam * weights.clamp(low, high))
        return Credit(
            torch.where(signals.mask, token_advantages, 0.0),
            torch.where(signals.mask, weights, 0.0),
            asymmetry,
            weight_bounds=(low, high),
            contrast=contrast,
        )

    def uses_teacher(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """See `Method.uses_teacher`."""
        weighted = (advantages != 0) & (self.lam > 0)
        return weighted & self.successful(rewards) if self.gated else weighted
