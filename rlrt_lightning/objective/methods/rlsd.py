"""RLSD: tokens that the teacher finds likelier get more credit, the opposite of RLRT."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlrt_lightning.objective.methods.base import Context, Needs, TeacherWeights
from rlrt_lightning.objective.methods.rlrt import RLRT
from rlrt_lightning.objective.ratios import bounded_ratio


@dataclass(frozen=True)
class RLSD(RLRT):
    """RLVR with self-distillation (arXiv:2604.03128): Eq. 7 of RLRT around the inverse weight.

    Tokens that the teacher, who knows the answer, finds likelier get more credit on good rollouts and less blame on
    bad ones. The teacher keeps the initial weights, as in its authors' code.

    Args:
        lam: Strength of the token weight, within 0 and 1; 0 is GRPO.
        eps_w: The weight is clipped to 1 - eps_w .. 1 + eps_w; arXiv:2605.10781 compares with 0.2.
        gated: Act on successful rollouts only. On, with a "sibling" as context, is "teacher-predicted" of
            arXiv:2605.10781, Fig. 1a, which differs from RLRT in the weight alone; so it has RLRT's teacher, the
            policy that drew the rollouts.
        success_threshold: A reward of at least this counts as success (r = 1).
        context: What the teacher sees besides the prompt: "answer", the ground-truth answer, "sibling", another
            successful rollout of the group, "solution", the reference solution, or "feedback", what the verifier said
            of the rollout.
        normalize_std: Divide advantages by the group's standard deviation.
        lam_decay_steps: Let lam fall linearly to 0 over this many optimizer steps; null keeps it constant.
    """

    eps_w: float = 0.2
    gated: bool = False
    context: Context = "answer"

    @property
    def needs(self) -> Needs:
        """See `Method.needs`."""
        return super().needs if self.gated else Needs(teacher=TeacherWeights(every_n_epochs=None))

    def token_weights(self, sign: Tensor, asymmetry: Tensor) -> Tensor:
        """w_t = (P_T / P_S)^sign(A), [N, T]; the arguments are those of `RLRT.token_weights`."""
        return bounded_ratio(-sign * asymmetry)
