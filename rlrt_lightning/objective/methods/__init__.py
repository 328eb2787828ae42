"""Token credit: how each method spreads a roll-out's advantage A over its tokens.

| method | context of the teacher | token weight w_t | acts on | besides |
| --- | --- | --- | --- | --- |
| `GRPO` | none | 1 | - | |
| `RLRT` | another correct roll-out of the group | (P_S / P_T)^sign(A) | correct roll-outs | |
| `RLRT(gated=False)` (the paper's RLRT-all) | same | same | all roll-outs | |
| `RLSD` | the ground-truth answer | (P_T / P_S)^sign(A) | all roll-outs | |
| `RLSD(gated=True, context="sibling")` (teacher-predicted) | another correct roll-out | same | correct roll-outs | |
| `SDPO` | another correct roll-out | none: no surrogate | all with a context | divergence to the teacher |
| `SRPO` | another correct roll-out | 1 | wrong ones with a context | divergence instead of surrogate |
| `EntropyBonus` | none | 1 | - | + coef * entropy of each token |
| `DIVER` | none | 1 | - | correct roll-outs are rewarded for diversity |

P_S is the policy (the student), P_T the same model that also sees the context (the teacher).
"""

from rlrt_lightning.objective.methods.base import Context, Credit, Method
from rlrt_lightning.objective.methods.distillation import SDPO, SRPO, Distilling
from rlrt_lightning.objective.methods.diver import DIVER
from rlrt_lightning.objective.methods.grpo import GRPO, EntropyBonus
from rlrt_lightning.objective.methods.reversed import RLRT, RLSD

__all__ = [
    "DIVER",
    "GRPO",
    "RLRT",
    "RLSD",
    "SDPO",
    "SRPO",
    "Context",
    "Credit",
    "Distilling",
    "EntropyBonus",
    "Method",
]
