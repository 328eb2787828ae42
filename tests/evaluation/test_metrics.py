"""avg@k, pass@k and their confidence intervals."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlrt_lightning.evaluation.metrics import AvgAtK, MeanOverProblems, PassAtK, interval95, mean_with_interval
from rlrt_lightning.objective import pass_at_k

CORRECT = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]]).bool()


def pass_at_k_by_enumeration(row: list[bool], k: int) -> float:
    draws = list(itertools.combinations(row, k))
    return sum(any(draw) for draw in draws) / len(draws)


def reference_mean_and_interval(values: list[float]) -> list[float]:
    """Mean and interval with Student's t from a printed table; the interval is of the values and two more, 0 and 1."""
    more = [0.0, 1.0, *values]
    t = {5: 2.5706, 6: 2.4469}[len(more) - 1]
    half_width = t * statistics.stdev(more) / math.sqrt(len(more))
    middle = statistics.fmean(more)
    return [statistics.fmean(values), max(0.0, middle - half_width), min(1.0, middle + half_width)]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_and_its_interval_match_enumeration(k: int) -> None:
    expected = [pass_at_k_by_enumeration(row, k) for row in CORRECT.tolist()]
    metric = PassAtK(k, interval=True)
    for rows in (CORRECT[:2], CORRECT[2:]):
        metric.update(rows)
    assert metric.compute().tolist() == pytest.approx(reference_mean_and_interval(expected), abs=5e-3)
    assert metric.compute().tolist() == pytest.approx(mean_with_interval(expected), abs=1e-12), "one implementation"
    alone = PassAtK(k)
    alone.update(CORRECT)
    assert float(alone.compute()) == pytest.approx(statistics.fmean(expected))


def test_avg_at_k_and_its_interval_match_the_formula() -> None:
    metric = AvgAtK(interval=True)
    metric.update(CORRECT)
    shares = CORRECT.double().mean(-1).tolist()
    assert metric.compute().tolist() == pytest.approx(reference_mean_and_interval(shares), abs=5e-3)
    assert metric.compute().tolist() == pytest.approx(mean_with_interval(shares), abs=1e-12)
    alone = AvgAtK()
    alone.update(CORRECT)
    assert alone.compute() == metric.compute()[0]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_interval_of_one_problem_is_0_to_1(share: float) -> None:
    assert mean_with_interval([share]) == (share, 0.0, 1.0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.integers(1, 40))
def test_an_interval_contains_the_mean_and_stays_within_0_and_1(values: list[float], times: int) -> None:
    mean, low, high = mean_with_interval(values * times)
    assert 0 <= low < high <= 1
    assert low - 1e-12 <= mean <= high + 1e-12


SAMPLES = 16
BETA = [(mean, size) for mean in (0.01, 0.05, 0.5, 0.95) for size in (0.1, 1.0, 10.0, 1000.0)]
"""Mean and a + b of the Beta distribution of solve rates; a small a + b: all or nothing, a large one: all alike."""
MIXED = [(0.05, 1.0, 0.0), (0.5, 1.0, 0.0), (0.94, 1.0, 0.0), (0.05, 1.0, 0.002), (0.1, 0.9, 0.01), (0.95, 1.0, 0.3)]
"""The share of problems with one solve rate, that rate, and the rate of the other problems."""


def coverage(correct: Tensor, truth: float, k: int) -> float:
    """The share of repeats whose pass@k interval contains the true mean; `correct` samples per problem [repeats, P]."""
    values = pass_at_k(SAMPLES, torch.arange(SAMPLES + 1), k)[correct]
    low, high = interval95(values.sum(1), (values**2).sum(1), values.shape[1])
    assert (low < high).all()
    assert (low >= 0).all()
    assert (high <= 1).all()
    return float(((low <= truth) & (truth <= high)).double().mean())


@pytest.mark.parametrize("problems", [1, 2, 5, 30, 100, 500])
def test_intervals_cover_the_true_mean(problems: int) -> None:
    """In simulations with new problems and new samples; k = 1 is avg@n."""
    random = np.random.default_rng(0)
    shape = 300_000 // max(problems, 100), problems
    for mean, size in BETA:
        a, b = mean * size, (1 - mean) * size
        correct = torch.from_numpy(random.binomial(SAMPLES, random.beta(a, b, shape)))
        for k in (1, 4, 16):
            truth = 1 - math.prod((b + i) / (a + b + i) for i in range(k))
            assert coverage(correct, truth, k) >= 0.92, (mean, size, k)
    for share, one, other in MIXED:
        chances = np.where(random.random(shape) < share, one, other)
        correct = torch.from_numpy(random.binomial(SAMPLES, chances))
        for k in (1, 4, 16):
            truth = share * (1 - (1 - one) ** k) + (1 - share) * (1 - (1 - other) ** k)
            assert coverage(correct, truth, k) >= 0.92, (share, one, other, k)


@pytest.mark.parametrize("cut", range(6))
def test_metrics_of_two_ranks_add_up_for_any_split(cut: int) -> None:
    """The states of two ranks, merged as torchmetrics does when it synchronizes."""

    def make() -> list[MeanOverProblems]:
        return [AvgAtK(interval=True), PassAtK(2, interval=True)]

    whole, first, second = make(), make(), make()
    for metrics, rows in ((whole, CORRECT), (first, CORRECT[:cut]), (second, CORRECT[cut:])):
        for metric in metrics:
            metric.update(rows)
    for together, one, other in zip(whole, first, second, strict=True):
        one.merge_state(other)
        torch.testing.assert_close(one.compute(), together.compute())
