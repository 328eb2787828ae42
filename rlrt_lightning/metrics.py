"""avg@k and pass@k as torchmetrics: they add up over batches and ranks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from statistics import fmean, stdev

import torch
from torch import Tensor
from torchmetrics import Metric

from rlrt_lightning.objective import pass_at_k

Z95 = 1.959963984540054
"""Standard deviations of the normal distribution on either side of the mean that hold 95 % of it."""


def mean_and_ci95(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval (normal approximation; NaN with fewer than two)."""
    half_width = Z95 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return fmean(values), half_width


class MeanOverProblems(Metric):
    """The mean over problems of a figure of each problem, in float64.

    Args:
        interval: Whether `compute` gives the 95 % confidence interval too.
    """

    full_state_update = False
    total: Tensor
    squares: Tensor
    problems: Tensor

    def __init__(self, interval: bool = False) -> None:
        super().__init__()
        self.interval = interval
        for state in ("total", "squares"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("problems", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @abstractmethod
    def of_each(self, correct: Tensor) -> Tensor:
        """The figure of each problem, float64 [P].

        Args:
            correct: Whether each sample of each problem is correct, bool [P, n].
        """

    def update(self, correct: Tensor) -> None:
        """Adds problems.

        Args:
            correct: Whether each sample of each problem is correct, [P, n].
        """
        figures = self.of_each(correct).to(self.total)
        self.total += figures.sum()
        self.squares += (figures**2).sum()
        self.problems += len(figures)

    def compute(self) -> Tensor:
        """The mean, a scalar within 0 and 1; NaN without problems. With `interval` [2]: the mean, and half the width of
        its 95 % confidence interval over problems (normal approximation; NaN with fewer than two)."""
        mean = self.total / self.problems
        if not self.interval:
            return mean
        variance = (self.squares - self.problems * mean**2).clamp(min=0) / (self.problems - 1)
        return torch.stack([mean, Z95 * (variance / self.problems).sqrt()])


class AvgAtK(MeanOverProblems):
    """Mean share of correct samples (avg@k of the paper's Table 1).

    Args:
        interval: Whether `compute` gives the 95 % confidence interval too.
    """

    def of_each(self, correct: Tensor) -> Tensor:
        """See `MeanOverProblems.of_each`."""
        return correct.double().mean(-1)


class PassAtK(MeanOverProblems):
    """Mean of the unbiased probability that one of k samples is correct (`pass_at_k`).

    Args:
        k: Samples that one may try; each problem needs at least so many.
        interval: Whether `compute` gives the 95 % confidence interval too.
    """

    def __init__(self, k: int, interval: bool = False) -> None:
        super().__init__(interval)
        self.k = k

    def of_each(self, correct: Tensor) -> Tensor:
        """See `MeanOverProblems.of_each`."""
        return pass_at_k(correct.shape[-1], correct.sum(-1).cpu(), self.k)
