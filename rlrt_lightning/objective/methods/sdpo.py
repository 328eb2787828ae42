"""SDPO: on every rollout with a context, the student is pulled towards the teacher's distribution."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlrt_lightning.objective.methods.base import Context, Credit, Needs, Remark, Signals, TeacherWeights
from rlrt_lightning.objective.methods.distillation import Distilling


@dataclass(frozen=True)
class SDPO(Distilling):
    """Self-distillation policy optimization (arXiv:2601.20802): no surrogate; on every rollout with a context, the loss
    is the student's divergence to the teacher. The mean is over the tokens of these rollouts.

    The teacher's weights are a moving average of the policy's, with a decay of 0.95 per epoch.

    Args:
        alpha: 0 is KL(teacher || student), 1 is KL(student || teacher), values between are generalized Jensen-Shannon
            divergences.
        top_k: Compare the student's k most likely tokens, and all others as one bucket; null compares the whole
            vocabulary and stores its log-probs for each token.
        importance_cap: Upper bound of each token's importance weight P_new / P_old.
        context: What the teacher sees besides the prompt: "sibling" (another successful rollout of the group),
            "solution", "answer" or "feedback".
        success_threshold: A reward of at least this counts as success (r = 1); only successful rollouts serve as
            "sibling" contexts.
        feedback: Also show the verifier's message about the rollout itself, after the context. Rollouts that have only
            one of the two get that one.
    """

    alpha: float = 0.5
    top_k: int | None = 100
    importance_cap: float = 2.0
    context: Context = "sibling"
    success_threshold: float = 0.5
    feedback: bool = False
    normalize_std = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feedback and self.context == "feedback":
            raise ValueError("SDPO.feedback is true, but SDPO.context is feedback already; set another context")

    @property
    def needs(self) -> Needs:
        """See `Method.needs`."""
        remark: Remark = "feedback" if self.feedback else "none"
        return Needs(top_k=self.top_k, teacher=TeacherWeights(ema_decay=0.95), remark=remark)

    def credit(self, signals: Signals) -> Credit:
        """See `Method.credit`."""
        plain = Credit.plain(signals)
        return replace(
            plain,
            advantages=torch.zeros_like(plain.weights),
            distillation=plain.weights * signals.has_context[:, None],
            divergence=self.divergence,
            counted=signals.has_context,
        )

    def uses_teacher(self, advantages: Tensor, rewards: Tensor) -> Tensor:
        """See `Method.uses_teacher`."""
        return torch.ones_like(rewards, dtype=torch.bool)
