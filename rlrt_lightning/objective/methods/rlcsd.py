"""RLCSD: the teacher's preference for a token given a successful sibling is contrasted with that given failed ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlrt_lightning.objective.methods.base import Credit, Needs, Signals, TeacherWeights
from rlrt_lightning.objective.methods.scheduled import Scheduled

WRONG_SIBLINGS = 4
"""Largest number of failed siblings that a rollout is contrasted with, as in RLCSD's code."""


@dataclass(frozen=True)
class RLCSD(Scheduled):
    """Contrastive self-distillation (arXiv:2606.11709 and its authors' code): the advantage of a token rises if a
    successful sibling makes it more likely than failed siblings do, which cancels effects of style.

    With e_t = log P_T(y_t | successful sibling) - log mean_k P_T(y_t | failed sibling k) over up to 4 failed siblings,
    r_t = clip(beta * lam * tanh(e_t / tau), residual_low, residual_high). Tokens with |r_t| > delta are selected and
    get A_t = A + r_t, without a change of sign; the others keep A. The loss is the clipped surrogate's mean over the
    tokens that are not selected plus eta times that over the selected ones (`two_path_surrogate`).

    Rollouts without a successful or without a failed sibling keep A. The teacher is a copy of the policy that is
    refreshed every 10 epochs.

    Args:
        beta: Factor of the residual r_t.
        lam: Strength of the residual, a second factor; 0 is GRPO with std (`GRPO(normalize_std=True)`).
        tau: Scale of e_t in the tanh, nats.
        delta: Tokens whose residual is larger than this in absolute value are selected.
        residual_low: Lower bound of the residual.
        residual_high: Upper bound of the residual.
        eta: Factor of the selected tokens' mean in the loss.
        success_threshold: A reward of at least this counts as success (r = 1).
        normalize_std: Divide advantages by the group's standard deviation.
        lam_warmup_steps: Raise lam linearly from 0 over this many optimizer steps; null starts with lam.
        lam_decay_steps: Decay lam linearly to 0 over this many optimizer steps, after its warm-up; null keeps it
            constant.
    """

    beta: float = 0.2
    lam: float = 0.5
    tau: float = 0.03
    delta: float = 0.02
    residual_low: float = -0.5
    residual_high: float = 0.5
    eta: float = 1.0
    success_threshold: float = 0.5
    normalize_std: bool = True
    lam_warmup_steps: int | None = None
    lam_decay_steps: int | None = None
    context = "sibling"

    def __post_init__(self) -> None:
        for name in ("beta", "lam", "delta", "eta"):
            if getattr(self, name) < 0:
                raise ValueError(f"RLCSD.{name} is {getattr(self, name)}; it has to be 0 or more")
        if self.tau <= 0:
            raise ValueError(f"RLCSD.tau is {self.tau}; it has to be above 0")
        if not self.residual_low <= 0 <= self.residual_high:
            raise ValueError(
                f"RLCSD.residual_low is {self.residual_low} and residual_high is {self.residual_high}; they have to "
                "be at most 0 and at least 0"
            )
        self.check_schedule()

    @property
    def needs(self) -> Needs:
        """See `Method.needs`."""
        teacher = TeacherWeights(every_n_epochs=10)
        return Needs(teacher=teacher, wrong_siblings=WRONG_SIBLINGS, aggregation="token-mean")

    def credit(self, signals: Signals) -> Credit:
        """A_t = A + r_t at selected tokens, but never with another sign than A; A at all others."""
        plain, contrast = Credit.plain(signals), signals.contrast
        residual = self.beta * self.lam * torch.tanh(contrast / self.tau)
        residual = residual.clamp(self.residual_low, self.residual_high)
        selected = residual.abs() > self.delta
        advantage = plain.advantages
        moved = advantage.sign() * (advantage.sign() * (advantage + residual)).clamp(min=0)
        return replace(
            plain,
            advantages=torch.where(selected, moved, advantage),
            contrast=contrast,
            selected=selected,
            eta=self.eta,
        )

    def uses_teacher(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """See `Method.uses_teacher`."""
        return torch.full_like(rewards, self.beta * self.lam > self.delta, dtype=torch.bool)
