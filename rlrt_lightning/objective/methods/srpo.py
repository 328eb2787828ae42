"""SRPO: GRPO where a rollout succeeded, SDPO's loss where it failed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlrt_lightning.objective.divergences import dynamic_weights
from rlrt_lightning.objective.methods.base import Context, Credit, Needs, Signals
from rlrt_lightning.objective.methods.distillation import Distilling


@dataclass(frozen=True)
class SRPO(Distilling):
    """Sample-routed policy optimization (arXiv:2604.02288): successful rollouts are reinforced by GRPO, failed ones
    corrected by the teacher.

    A failed rollout that has a context gets SDPO's loss, each token times exp(-beta H(P_T)) scaled to a mean of 1 over
    these tokens; every other rollout gets GRPO's. One mean is taken over the tokens of both.

    Args:
        beta: How much less tokens count at which the teacher's entropy is high; 0 counts all tokens the same.
        alpha: Which divergence: 0 is KL(teacher || student), 1 is KL(student || teacher), between them the generalised
            Jensen-Shannon divergence.
        top_k: Compare the student's k likeliest tokens, and the rest as one bucket; null compares the whole vocabulary,
            whose log-probs are then kept for each token.
        importance_cap: Upper limit of each token's importance weight P_new / P_old in the divergence.
        context: What the teacher sees besides the prompt: "sibling", another successful rollout of the group,
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

    @property
    def needs(self) -> Needs:
        """See `Method.needs`."""
        return Needs(entropy=True, top_k=self.top_k)

    def credit(self, signals: Signals) -> Credit:
        """See `Method.credit`."""
        if signals.teacher_entropy is None:
            raise ValueError("SRPO needs teacher_entropy, the teacher's entropy at each token")
        corrected = (~self.successful(signals.rewards) & signals.has_context)[:, None] & signals.mask
        weights = dynamic_weights(signals.teacher_entropy, corrected, self.beta, signals.sum_over_ranks)
        plain = Credit.plain(signals)
        return replace(
            plain,
            advantages=torch.where(corrected, 0.0, plain.advantages),
            distillation=weights.detach(),
            divergence=self.divergence,
        )

    def uses_teacher(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """See `Method.uses_teacher`."""
        return ~self.successful(rewards)
