"""The mathematics, as pure tensor functions: no model, no Lightning, no I/O.

From rewards to gradients: `advantages` (group advantage A), `methods` (token credit: Eqs. 6 and 7 of arXiv:2605.10781),
`divergences` (minimized by SDPO and SRPO), `surrogate` (the losses). `shaping` holds terms added to the reward,
`ratios` bounds every probability ratio, `estimators` holds pass@k. Dtypes are preserved, except that ratios and losses
of half-precision inputs are float32.

Shapes: N rollouts; T is the length of the longest response in the batch. A mask [N, T] is true at response tokens.
"""

from rlrt_lightning.objective.advantages import group_advantages
from rlrt_lightning.objective.divergences import divergence, divergence_on_support, dynamic_weights
from rlrt_lightning.objective.estimators import pass_at_k
from rlrt_lightning.objective.gate import EntropyGate
from rlrt_lightning.objective.methods import (
    DIVER,
    GRPO,
    RLCSD,
    RLRT,
    RLSD,
    SDPO,
    SRPO,
    AntiSD,
    Context,
    Credit,
    DivergenceSettings,
    EntropyBonus,
    Method,
    Needs,
    Signals,
    TeacherWeights,
)
from rlrt_lightning.objective.shaping import overlong_penalty
from rlrt_lightning.objective.surrogate import (
    Aggregation,
    Importance,
    Ratio,
    Surrogate,
    cispo_surrogate,
    clipped_surrogate,
    distillation_loss,
    importance_weights,
    path_weights,
    reference_kl,
    token_mean,
    two_path_surrogate,
)

__all__ = [
    "DIVER",
    "GRPO",
    "RLCSD",
    "RLRT",
    "RLSD",
    "SDPO",
    "SRPO",
    "Aggregation",
    "AntiSD",
    "Context",
    "Credit",
    "DivergenceSettings",
    "EntropyBonus",
    "EntropyGate",
    "Importance",
    "Method",
    "Needs",
    "Ratio",
    "Signals",
    "Surrogate",
    "TeacherWeights",
    "cispo_surrogate",
    "clipped_surrogate",
    "distillation_loss",
    "divergence",
    "divergence_on_support",
    "dynamic_weights",
    "group_advantages",
    "importance_weights",
    "overlong_penalty",
    "pass_at_k",
    "path_weights",
    "reference_kl",
    "token_mean",
    "two_path_surrogate",
]
