"""avg@k and pass@k as torchmetrics, accumulated over batches and ranks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from rlrt_lightning.objective import pass_at_k

Z95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution: 95 % lies within this distance of the mean."""


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
    """The mean of one value from 0 to 1 per problem, with `interval95`."""
    scores = torch.tensor(values, dtype=torch.float64)
    return Interval(float(scores.mean()), *interval95(scores.sum(), (scores**2).sum(), len(scores)).tolist())


def interval95(total: Tensor, squares: Tensor, problems: int | Tensor) -> Tensor:
    """The 95 % confidence interval, over problems, of the mean of values from 0 to 1.

    Student's t interval after adding two pseudo-problems, one always solved and one never solved, as Agresti and Coull
    (1998) do for proportions. Without them, the interval is too narrow, or has width 0, for a few problems of which
    nearly all or nearly none are solved. The interval contains the mean and lies within 0 and 1; for a single problem
    it is 0 to 1.

    In the simulations of tests/evaluation/test_metrics.py (1 to 500 problems, whose solve rates range from equal to
    only 0 and 1; avg@16, pass@4 and pass@16), it covers the true mean in at least 93 % of the cases in every setting.

    Args:
        total: Sum of the values, float64 [...].
        squares: Sum of their squares, float64 [...].
        problems: Number of problems.

    Returns:
        Lower and upper bound, float64 [2, ...].
    """
    n = torch.as_tensor(problems).to(total) + 2
    mean = (total + 1) / n
    variance = (squares + 1 - n * mean**2) / (n - 1)
    half_width = _students_t95(n - 1) * (variance / n).sqrt()
    return torch.stack([mean - half_width, mean + half_width]).clamp(0, 1)


def _students_t95(freedom: Tensor) -> Tensor:
    """The 97.5 % quantile of Student's t, by an expansion in 1 / degrees of freedom (Abramowitz and Stegun, 26.7.5):
    0.6 % too small for 6 degrees of freedom, accurate to four digits from 30."""
    z = Z95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


class MeanOverProblems(Metric):
    """The mean over problems of one value per problem, in float64.

    Args:
        interval: Whether `compute` also returns the 95 % confidence interval.
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
    def per_problem(self, correct: Tensor) -> Tensor:
        """The value of each problem, float64 [P].

        Args:
            correct: Whether each of n samples of P problems is correct, bool [P, n].
        """

    def update(self, correct: Tensor) -> None:
        """Adds problems.

        Args:
            correct: Whether each of n samples of P problems is correct, [P, n].
        """
        values = self.per_problem(correct).to(self.total)
        self.total += values.sum()
        self.squares += (values**2).sum()
        self.problems += len(values)

    def compute(self) -> Tensor:
        """The mean, a scalar from 0 to 1, NaN without problems. With `interval`, [3]: the mean, and the lower and upper
        bounds of its 95 % confidence interval over problems (`interval95`)."""
        mean = self.total / self.problems
        if not self.interval:
            return mean
        return torch.cat([mean[None], interval95(self.total, self.squares, self.problems)])


class AvgAtK(MeanOverProblems):
    """Mean fraction of correct samples (avg@k in the paper's Table 1).

    Args:
        interval: Whether `compute` also returns the 95 % confidence interval.
    """

    def per_problem(self, correct: Tensor) -> Tensor:
        """See `MeanOverProblems.per_problem`."""
        return correct.double().mean(-1)


class PassAtK(MeanOverProblems):
    """Mean probability that at least one of k samples is correct, by the unbiased estimator `pass_at_k`.

    Args:
        k: Number of attempts; each problem needs at least k samples.
        interval: Whether `compute` also returns the 95 % confidence interval.
    """

    def __init__(self, k: int, interval: bool = False) -> None:
        super().__init__(interval)
        self.k = k

    def per_problem(self, correct: Tensor) -> Tensor:
        """See `MeanOverProblems.per_problem`."""
        return pass_at_k(correct.shape[-1], correct.sum(-1).cpu(), self.k)
