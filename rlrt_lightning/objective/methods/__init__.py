"""Token credit: how each method distributes a rollout's advantage A over its tokens.

| method | teacher context | token weight w_t | applies to rollouts | other differences from GRPO |
| --- | --- | --- | --- | --- |
| `GRPO` | none | 1 | - | |
| `RLRT` | another successful rollout of the group | (P_S / P_T)^sign(A) | successful | |
| `RLRT(gated=False)` (the paper's RLRT-all) | same | same | all | |
| `RLRT(contrast=True)` (ours, not the paper's) | same, and failed ones | (mean P_T(failed) / P_T)^sign(A) | same | |
| `RLSD` | ground-truth answer | (P_T / P_S)^sign(A) | all | teacher has the initial weights |
| `RLSD(gated=True, context="sibling")` (teacher-predicted) | another successful rollout | same | successful | |
| `AntiSD` | successful rollout or solution; verdict | 1 | all with a context | adds a reward for disagreement; gate |
| `RLCSD` | successful rollout; failed ones | 1 | all with both | adds a residual at selected tokens; two means |
| `SDPO` | another successful rollout | none: no surrogate | all with a context | divergence to an EMA teacher |
| `SRPO` | another successful rollout | 1 | failed with a context | divergence instead of the surrogate |
| `EntropyBonus` | none | 1 | - | adds coef * entropy of each token |
| `DIVER` | none | 1 | - | diversity reward for successful rollouts |

P_S is the policy (the student); P_T is the same model that also sees the context (the teacher).
"""

from rlrt_lightning.objective.methods.antisd import AntiSD
from rlrt_lightning.objective.methods.base import (
    Context,
    Credit,
    DivergenceSettings,
    Method,
    Needs,
    Remark,
    Signals,
    TeacherWeights,
)
from rlrt_lightning.objective.methods.diver import DIVER
from rlrt_lightning.objective.methods.entropy_bonus import EntropyBonus
from rlrt_lightning.objective.methods.grpo import GRPO
from rlrt_lightning.objective.methods.rlcsd import RLCSD
from rlrt_lightning.objective.methods.rlrt import RLRT
from rlrt_lightning.objective.methods.rlsd import RLSD
from rlrt_lightning.objective.methods.sdpo import SDPO
from rlrt_lightning.objective.methods.srpo import SRPO

__all__ = [
    "DIVER",
    "GRPO",
    "RLCSD",
    "RLRT",
    "RLSD",
    "SDPO",
    "SRPO",
    "AntiSD",
    "Context",
    "Credit",
    "DivergenceSettings",
    "EntropyBonus",
    "Method",
    "Needs",
    "Remark",
    "Signals",
    "TeacherWeights",
]
