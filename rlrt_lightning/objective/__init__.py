"""The mathematics, as pure tensor functions: no model, no Lightning, no I/O.

From rewards to the gradient: `advantages` (group advantage A), `methods` (token credit: Eqs. 6 and 7 of
arXiv:2605.10781), `divergences` (what SDPO and SRPO minimise), `surrogate` (the losses). `ratios` bounds every ratio of
probabilities, `estimators` holds pass@k. All keep the dtype they are given, but half precision, whose ratios and losses
are float32.

Shapes: N roll-outs, T the longest response of the batch; a mask [N, T] is true at response tokens.
"""

from rlrt_lightning.objective.advantages import group_advantages
from rlrt_lightning.objective.divergences import divergence, divergence_on_support, dynamic_weights, entropy
from rlrt_lightning.objective.estimators import pass_at_k
from rlrt_lightning.objective.methods import (
    DIVER,
    GRPO,
    RLRT,
    RLSD,
    SDPO,
    SRPO,
    Credit,
    Distilling,
    EntropyBonus,
    Method,
)
from rlrt_lightning.objective.surrogate import (
    Aggregation,
    Importance,
    Surrogate,
    clipped_surrogate,
    distillation_loss,
    importance_weights,
    token_mean,
)

__all__ = [
    "DIVER",
    "GRPO",
    "RLRT",
    "RLSD",
    "SDPO",
    "SRPO",
    "Aggregation",
    "Credit",
    "Distilling",
    "EntropyBonus",
    "Importance",
    "Method",
    "Surrogate",
    "clipped_surrogate",
    "distillation_loss",
    "divergence",
    "divergence_on_support",
    "dynamic_weights",
    "entropy",
    "group_advantages",
    "importance_weights",
    "pass_at_k",
    "token_mean",
]
