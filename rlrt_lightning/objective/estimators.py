"""pass@k from n samples."""

from __future__ import annotations

import torch
from torch import Tensor


def pass_at_k(n: int | Tensor, c: int | Tensor, k: int) -> Tensor:
    """Probability that at least one of k samples is correct, unbiased: 1 - C(n-c, k) / C(n, k) (arXiv:2107.03374).

    Args:
        n: Samples of each problem, a number or [...].
        c: Correct ones among them, a number or [...].
        k: Samples that one may try, 1 <= k <= n.

    Returns:
        float64 [...].

    Raises:
        ValueError: If k is below 1 or above n, or c is not within 0 to n.
    """
    samples, correct = torch.broadcast_tensors(torch.as_tensor(n), torch.as_tensor(c))
    if k < 1 or bool((samples < k).any()):
        raise ValueError(f"pass@{k} needs k >= 1 and at least k samples of each problem")
    if bool(((correct < 0) | (correct > samples)).any()):
        raise ValueError("the number of correct samples has to be within 0 and n")
    # C(n-c, k) / C(n, k) = prod_{i<k} (n-c-i) / (n-i), term by term: no factorial to overflow.
    i = torch.arange(k, dtype=torch.float64)
    terms = ((samples - correct)[..., None] - i).clamp(min=0) / (samples[..., None] - i)
    return 1.0 - terms.prod(-1)
