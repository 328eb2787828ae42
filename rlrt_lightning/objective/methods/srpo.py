"""SRPO: GRPO on successful rollouts, the loss of SDPO on failed ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlrt_lightning.objective.divergences import dynamic_weights
from rlrt_lightning.objective.methods.base import Context, Credit, Needs, Signals
from rlrt_lightning.objective.methods.distillation import Distilling


@dataclass(frozen=True)
class SRPO(Distilling):
    """Sample-routed policy optimization (arXiv:2604.02288): GRPO reinforces successful rollouts, the teacher corrects
    failed ones.

    A failed rollout with a context gets the loss of SDPO, with token weights exp(-beta H(P_T)) normalized to mean 1
    over these tokens; every other rollout gets the loss of GRPO. One mean is taken over the tokens of all rollouts.

    Args:
        beta: Reduces the weight of tokens at which the teacher's entropy is high; 0 weights all tokens equally.
        alpha: 0 is KL(teacher || student), 1 is KL(student || teacher), values between are generalized Jensen-Shannon
            divergences.
        top_k: Compare the student's k most likely tokens, and all others as one bucket; null compares the whole
            vocabulary and stores its log-probs for each token.
        importance_cap: Upper bound of each token's importance weight P_new / P_old in the divergence.
        context: What the teacher sees besides the prompt: "sibling" (another successful rollout of the group),
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
