"""RLSD: tokens that the teacher finds more likely get more credit, the opposite of RLRT."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from rlrt_lightning.objective.methods.base import Context, Needs, Signals, TeacherWeights
from rlrt_lightning.objective.methods.rlrt import RLRT
from rlrt_lightning.objective.ratios import bounded_ratio


@dataclass(frozen=True)
class RLSD(RLRT):
    """RLVR with self-distillation (arXiv:2604.03128): RLRT with the inverse token weight in Eq. 7.

    Tokens that the teacher finds more likely get more credit if A > 0 and less blame if A < 0. The teacher keeps the
    initial weights, as in the authors' code.

    Args:
        lam: Strength of the token weight, from 0 to 1; 0 is GRPO with std (`GRPO(normalize_std=True)`).
        eps_w: The token weight is clipped to [1 - eps_w, 1 + eps_w]; arXiv:2605.10781 uses 0.2 for RLSD.
        gated: Apply the token weight to successful rollouts only. True with the context "sibling" is
            "teacher-predicted" in Fig. 1a of arXiv:2605.10781, which differs from RLRT in the token weight only;
            therefore its teacher is that of RLRT, the policy that generated the rollouts.
        success_threshold: A reward of at least this counts as success (r = 1).
        context: What the teacher sees besides the prompt: "answer" (the ground-truth answer), "sibling" (another
            successful rollout of the group), "solution" (the reference solution) or "feedback" (the verifier's message
            about the rollout).
        normalize_std: Divide advantages by the group's standard deviation.
        contrast: Use RLRT's contrast with failed siblings (see `RLRT`), with the inverse weight; requires the context
            "sibling". Rollouts without a failed sibling get weight 1.
        lam_warmup_steps: Raise lam linearly from 0 over this many optimizer steps; null starts with lam.
        lam_decay_steps: Decay lam linearly to 0 over this many optimizer steps, after its warm-up; null keeps it
            constant.
        thoughts_only: Apply the token weight only to tokens between <think> and </think>, as an option of the authors'
            code does; other tokens get weight 1. See `signal/thoughts`.
    """

    eps_w: float = 0.2
    gated: bool = False
    context: Context = "answer"
    thoughts_only: bool = False

    @property
    def needs(self) -> Needs:
        """See `Method.needs`."""
        needs = replace(super().needs, thoughts=self.thoughts_only)
        return needs if self.gated else replace(needs, teacher=TeacherWeights(every_n_epochs=None))

    def acts_on(self, signals: Signals) -> Tensor:
        """See `RLRT.acts_on`."""
        acts = super().acts_on(signals)
        if not self.thoughts_only:
            return acts
        if signals.thoughts is None:
            raise ValueError("RLSD.thoughts_only needs thoughts, the tokens inside thinking tags")
        return acts & signals.thoughts

    def token_weights(self, sign: Tensor, asymmetry: Tensor) -> Tensor:
        """w_t = exp(-sign(A) * D_t) = (P_T^t(y_t) / P_S^t(y_t))^sign(A), [N, T]; see `RLRT.token_weights`."""
        return bounded_ratio(-sign * asymmetry)
