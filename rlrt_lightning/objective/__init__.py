"""The mathematics, as pure tensor functions: no model, no Lightning, no I/O.

From rewards to the gradient: `advantages` (group advantage A), `methods` (token credit: Eqs. 6 and 7 of
arXiv:2605.10781), `surrogate` (the clipped loss). `estimators` holds pass@k. All keep the dtype they are given.

Shapes: N roll-outs, T the longest response of the batch; a mask [N, T] is true at response tokens.
"""

from rlrt_lightning.objective.advantages import group_advantages
from rlrt_lightning.objective.estimators import pass_at_k
from rlrt_lightning.objective.methods import GRPO, RLRT, RLSD, Credit, Method
from rlrt_lightning.objective.surrogate import Aggregation, Surrogate, clipped_surrogate

__all__ = [
    "GRPO",
    "RLRT",
    "RLSD",
    "Aggregation",
    "Credit",
    "Method",
    "Surrogate",
    "clipped_surrogate",
    "group_advantages",
    "pass_at_k",
]
