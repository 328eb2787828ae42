"""avg@k and pass@k as torchmetrics: they add up over batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from rlrt_lightning.objective import pass_at_k


class AvgAtK(Metric):
    """Mean share of correct samples over problems (avg@k of the paper's Table 1)."""

    full_state_update = False
    solved: Tensor
    problems: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("solved", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("problems", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, correct: Tensor) -> None:
        """Adds problems.

        Args:
            correct: Whether each sample of each problem is correct, [P, n].
        """
        self.solved += correct.double().mean(-1).sum()
        self.problems += len(correct)

    def compute(self) -> Tensor:
        """The mean, a scalar within 0 and 1; NaN without problems."""
        return self.solved / self.problems


class PassAtK(Metric):
    """Mean over problems of the unbiased probability that one of k samples is correct (`pass_at_k`).

    Args:
        k: Samples that one may try; each problem needs at least so many.
    """

    full_state_update = False
    passed: Tensor
    problems: Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.add_state("passed", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("problems", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, correct: Tensor) -> None:
        """Adds problems.

        Args:
            correct: Whether each sample of each problem is correct, [P, n] with n >= k.
        """
        passed = pass_at_k(correct.shape[-1], correct.sum(-1).cpu(), self.k)
        self.passed += passed.sum().to(self.passed.device)
        self.problems += len(correct)

    def compute(self) -> Tensor:
        """The mean, a scalar within 0 and 1; NaN without problems."""
        return self.passed / self.problems
