"""Estimator of pass@k from n samples."""

from __future__ import annotations

import torch
from torch import Tensor


def pass_at_k(n: int | Tensor, c: int | Tensor, k: int) -> Tensor:
    """Unbiased estimate of the probability that at least one of k samples is correct: 1 - C(n-c, k) / C(n, k)
    (arXiv:2107.03374).

    Args:
        n: Number of samples of each problem, a number or [...].
        c: Number of correct samples, a number or [...].
        k: Number of attempts, 1 <= k <= n.

    Returns:
        float64 [...].

    Raises:
        ValueError: If k is below 1 or above n, or c is not from 0 to n.
    """
    samples, correct = torch.broadcast_tensors(torch.as_tensor(n), torch.as_tensor(c))
    if k < 1 or bool((samples < k).any()):
        raise ValueError(f"pass@{k} needs k >= 1 and at least k samples of each problem")
    if bool(((correct < 0) | (correct > samples)).any()):
        raise ValueError("the number of correct samples has to be from 0 to n")
    # C(n-c, k) / C(n, k) = prod_{i<k} (n-c-i) / (n-i), without factorials, which would overflow.
    i = torch.arange(k, dtype=torch.float64)
    terms = ((samples - correct)[..., None] - i).clamp(min=0) / (samples[..., None] - i)
    return 1.0 - terms.prod(-1)
