"""AntiSD: tokens on which the student disagreed with the teacher get more credit, on every rollout."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlrt_lightning.objective.gate import EntropyGate
from rlrt_lightning.objective.methods.base import Context, Credit, Needs, Signals
from rlrt_lightning.objective.methods.scheduled import Scheduled


@dataclass(frozen=True)
class AntiSD(Scheduled):
    """Anti-self-distillation (arXiv:2605.11609, Eqs. 2, 6 and 7, Algorithm 1): a bounded reward for disagreeing with
    the teacher is added to the advantage, on every rollout with a context, also on failed ones and where A = 0.

    An entropy gate turns the reward off while the teacher is too certain (see `EntropyGate`). Its state is part of the
    checkpoint. The teacher's prompt ends with "Your answer is correct." or "Your answer is incorrect.", about the
    rollout itself.

    Args:
        lam: Strength of the reward; 0 is GRPO with std (`GRPO(normalize_std=True)`).
        warmup_steps: Number of epochs with scored rollouts from whose entropies the gate computes its reference; the
            gate is closed during them. 0 for no gate.
        close_at: The gate closes at an entropy below this fraction of the reference.
        success_threshold: A reward of at least this counts as success (r = 1).
        context: What the teacher sees besides the prompt: "sibling_or_solution" (another successful rollout of the
            group, or the reference solution if there is none), "sibling", "solution", "answer" (the ground-truth
            answer) or "feedback" (the verifier's message about the rollout).
        normalize_std: Divide advantages by the group's standard deviation.
        lam_warmup_steps: Raise lam linearly from 0 over this many optimizer steps; null starts with lam.
        lam_decay_steps: Decay lam linearly to 0 over this many optimizer steps, after its warm-up; null keeps it
            constant.
    """

    lam: float = 0.5
    warmup_steps: int = 5
    close_at: float = 0.93
    success_threshold: float = 0.5
    context: Context = "sibling_or_solution"
    normalize_std: bool = True
    lam_warmup_steps: int | None = None
    lam_decay_steps: int | None = None

    def __post_init__(self) -> None:
        if self.lam < 0:
            raise ValueError(f"AntiSD.lam is {self.lam}; it has to be 0 or more")
        if self.context == "none":
            raise ValueError("AntiSD.context is 'none', so there is no teacher; set a context, or use GRPO")
        self.check_schedule()
        try:
            self.new_gate()
        except ValueError as error:
            raise ValueError(f"AntiSD.{error}") from None

    @property
    def needs(self) -> Needs:
        """See `Method.needs`."""
        return Needs(entropy=self.warmup_steps > 0, remark="verdict")

    def new_gate(self) -> EntropyGate | None:
        """See `Method.new_gate`."""
        return EntropyGate(self.warmup_steps, self.close_at) if self.warmup_steps else None

    def penalty(self, asymmetry: Tensor) -> Tensor:
        """phi(u) = (softplus(u) - log 2) / 2 with u = log P_T - log P_S = -D_t (Eq. 6), nats, [N, T]: at least
        -log 2 / 2; 0 where student and teacher agree."""
        return (torch.logaddexp(-asymmetry, torch.zeros_like(asymmetry)) - math.log(2)) / 2

    def credit(self, signals: Signals) -> Credit:
        """A_t = A - lam * phi(u_t) (Eq. 7) on rollouts with a context; A while the gate is closed."""
        plain = Credit.plain(signals)
        acts = signals.mask & signals.has_context[:, None] & signals.gate_open
        penalty = torch.where(acts, self.penalty(plain.asymmetry), 0.0)
        return replace(plain, advantages=plain.advantages - self.lam * penalty)

    def uses_teacher(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """See `Method.uses_teacher`. With a closed gate too: its entropies decide when it opens."""
        return torch.full_like(rewards, self.lam > 0, dtype=torch.bool)
