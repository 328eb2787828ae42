"""Token credit: how each method spreads a rollout's advantage A over its tokens.

| method | context of the teacher | token weight w_t | acts on | besides |
| --- | --- | --- | --- | --- |
| `GRPO` | none | 1 | - | |
| `RLRT` | another correct rollout of the group | (P_S / P_T)^sign(A) | correct rollouts | |
| `RLRT(gated=False)` (the paper's RLRT-all) | same | same | all rollouts | |
| `RLSD` | the ground-truth answer | (P_T / P_S)^sign(A) | all rollouts | teacher: initial weights |
| `RLSD(gated=True, context="sibling")` (teacher-predicted) | another correct rollout | same | correct rollouts | |
| `SDPO` | another correct rollout | none: no surrogate | all with a context | divergence to the teacher: an EMA |
| `SRPO` | another correct rollout | 1 | wrong ones with a context | divergence instead of surrogate |
| `EntropyBonus` | none | 1 | - | + coef * entropy of each token |
| `DIVER` | none | 1 | - | correct rollouts are rewarded for diversity |

P_S is the policy (the student), P_T the same model that also sees the context (the teacher).
"""

from rlrt_lightning.objective.methods.base import (
    Context,
    Credit,
    DivergenceSettings,
    Method,
    Needs,
    Signals,
    TeacherWeights,
)
from rlrt_lightning.objective.methods.diver import DIVER
from rlrt_lightning.objective.methods.entropy_bonus import EntropyBonus
from rlrt_lightning.objective.methods.grpo import GRPO
from rlrt_lightning.objective.methods.rlrt import RLRT
from rlrt_lightning.objective.methods.rlsd import RLSD
from rlrt_lightning.objective.methods.sdpo import SDPO
from rlrt_lightning.objective.methods.srpo import SRPO

__all__ = [
    "DIVER",
    "GRPO",
    "RLRT",
    "RLSD",
    "SDPO",
    "SRPO",
    "Context",
    "Credit",
    "DivergenceSettings",
    "EntropyBonus",
    "Method",
    "Needs",
    "Signals",
    "TeacherWeights",
]
