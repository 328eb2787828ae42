"""Ratios of probabilities from log-probs. All are bounded here: one token cannot overflow the loss of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

LOG_ZERO = -1e4
"""log 0 as a number: its exp is exactly 0, and 0 times it is 0, which 0 times -inf is not."""

LOG_RATIO_BOUND = 20.0
"""Nats, as in verl. e^20 is 5e8: far beyond every clip, and finite in float32 times an advantage and summed."""


def log_ratio(logp: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """log P - log Q of each token, finite where a log-prob is -inf. It is not bounded: `bounded_ratio` does that.

    Args:
        logp: log P, nats, [N, T].
        other: log Q, nats, [N, T].
        mask: True at the tokens that are read, [N, T]; the others may hold anything.

    Returns:
        Nats, [N, T], 0 outside the mask; half precision becomes float32. Gradient flows through both.
    """
    # Not clamp, whose gradient is 0 where a log-prob is NaN.
    p, q = (torch.where(w < LOG_ZERO, LOG_ZERO, w) for w in (widened(logp), widened(other)))
    return torch.where(mask.bool(), p - q, 0.0)


def bounded_ratio(log_ratio: Tensor) -> Tensor:
    """P / Q from log P - log Q, which is bounded to +-20 nats. There is no gradient beyond the bound."""
    return _bounded(log_ratio).exp()


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """KL(Q || P) estimated at tokens that Q sampled: (rho - 1) - log rho with rho = P / Q, which is never negative
    ("k3", http://joschu.net/blog/kl-approx.html). Nats, in the shape of log P - log Q, which is bounded to +-20."""
    bounded = _bounded(log_ratio)
    return bounded.exp() - 1 - bounded


def _bounded(log_ratio: Tensor) -> Tensor:
    """NaN stays NaN in the gradient too, where `clamp` alone would give 0: a step that saw one has to be skipped."""
    return torch.where(log_ratio.isnan(), log_ratio, log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))


def widened(values: Tensor) -> Tensor:
    """Half precision as float32: float16 overflows at e^11.1, and bfloat16 cannot count beyond 256."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
