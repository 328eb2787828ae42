"""Probability ratios from log-probs, bounded so that no single token can overflow the loss of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

LOG_ZERO = -1e4
"""Finite stand-in for log 0: its exp is exactly 0, and 0 * LOG_ZERO is 0, whereas 0 * -inf is NaN."""

LOG_RATIO_BOUND = 20.0
"""Nats, as in verl. e^20 = 5e8 is far beyond every clip range, and sums of products with it stay finite in float32."""


def log_ratio(logp: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """log P - log Q of each token, finite even if a log-prob is -inf. Not bounded; `bounded_ratio` bounds it.

    Args:
        logp: log P, nats, [N, T].
        other: log Q, nats, [N, T].
        mask: True at the tokens to compare, [N, T]; values elsewhere are ignored.

    Returns:
        Nats, [N, T], 0 outside the mask; half precision becomes float32. Gradients flow through both.
    """
    # Not `clamp`: its gradient is 0 at NaN, and NaN must reach the gradient.
    p, q = (torch.where(w < LOG_ZERO, LOG_ZERO, w) for w in (widened(logp), widened(other)))
    return torch.where(mask.bool(), p - q, 0.0)


def bounded_ratio(log_ratio: Tensor) -> Tensor:
    """P / Q from log P - log Q, bounded to +-20 nats. The gradient is 0 beyond the bound."""
    return _bounded(log_ratio).exp()


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """Estimate of KL(Q || P) at tokens sampled from Q: (rho - 1) - log rho with rho = P / Q, never negative ("k3",
    http://joschu.net/blog/kl-approx.html). Nats, in the shape of log P - log Q, which is bounded to +-20 nats."""
    bounded = _bounded(log_ratio)
    return bounded.exp() - 1 - bounded


def _bounded(log_ratio: Tensor) -> Tensor:
    """Clamps to +-20 nats. NaN propagates to the gradient (that of `clamp` alone is 0), so that the step is skipped."""
    return torch.where(log_ratio.isnan(), log_ratio, log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))


def widened(values: Tensor) -> Tensor:
    """Half precision as float32: float16 overflows at e^11.1, and bfloat16 cannot represent all integers above 256."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
