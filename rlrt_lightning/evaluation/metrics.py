"""avg@k and pass@k as torchmetrics: they add up over batches and ranks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from rlrt_lightning.objective import pass_at_k

Z95 = 1.959963984540054
"""Standard deviations of the normal distribution on either side of the mean that hold 95 % of it."""


class Interval(NamedTuple):
    """A mean over problems with its 95 % confidence interval.

    Args:
        mean: The mean.
        low: Lower bound of the interval.
        high: Upper bound.
    """

    mean: float
    low: float
    high: float


def mean_with_interval(values: Sequence[float]) -> Interval:
    """The mean of a figure of each problem, all within 0 and 1, and `interval95`."""
    figures = torch.tensor(values, dtype=torch.float64)
    return Interval(float(figures.mean()), *interval95(figures.sum(), (figures**2).sum(), len(figures)).tolist())


def interval95(total: Tensor, squares: Tensor, problems: int | Tensor) -> Tensor:
    """The 95 % confidence interval, over problems, of the mean of a figure within 0 and 1.

    Student's t around the mean of the problems and of two more, one that is always solved and one that never is. This
    is what Agresti and Coull (1998) do for shares. Without the two, few problems nearly all of which are solved, or
    nearly none, have too narrow an interval, or one of width 0. The interval holds the mean and lies within 0 and 1;
    for one problem it is 0 to 1, as one says nothing of others.

    In the simulations of tests/evaluation/test_metrics.py (1 to 500 problems, from alike to all or nothing; avg@16,
    pass@4 and pass@16) it covers the true mean in at least 93 % of the cases in every setting.

    Args:
        total: Sum of the figures, float64 [...].
        squares: Sum of their squares, float64 [...].
        problems: How many there are.

    Returns:
        Lower and upper bound, float64 [2, ...].
    """
    n = torch.as_tensor(problems).to(total) + 2
    mean = (total + 1) / n
    variance = (squares + 1 - n * mean**2) / (n - 1)
    half_width = _students_t95(n - 1) * (variance / n).sqrt()
    return torch.stack([mean - half_width, mean + half_width]).clamp(0, 1)


def _students_t95(freedom: Tensor) -> Tensor:
    """`Z95` for Student's t, from its expansion in 1 / degrees of freedom (Abramowitz and Stegun, 26.7.5); 0.6 % too
    small at 6, and exact to four digits from 30 on."""
    z = Z95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


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
        """The mean, a scalar within 0 and 1; NaN without problems. With `interval` [3]: the mean, and lower and upper
        bound of its 95 % confidence interval over problems (`interval95`)."""
        mean = self.total / self.problems
        if not self.interval:
            return mean
        return torch.cat([mean[None], interval95(self.total, self.squares, self.problems)])


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
