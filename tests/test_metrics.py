"""avg@k, pass@k and their confidence intervals."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch

from rlrt_lightning.metrics import AvgAtK, MeanOverProblems, PassAtK

CORRECT = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]]).bool()


def brute_pass(row: list[bool], k: int) -> float:
    draws = list(itertools.combinations(row, k))
    return sum(any(draw) for draw in draws) / len(draws)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_with_its_interval_is_what_trying_all_draws_gives(k: int) -> None:
    expected = [brute_pass(row, k) for row in CORRECT.tolist()]
    metric = PassAtK(k, interval=True)
    for rows in (CORRECT[:2], CORRECT[2:]):
        metric.update(rows)
    half_width = 1.959963984540054 * statistics.stdev(expected) / math.sqrt(len(expected))
    assert metric.compute().tolist() == pytest.approx([statistics.fmean(expected), half_width])


def test_avg_with_its_interval() -> None:
    metric = AvgAtK(interval=True)
    metric.update(CORRECT)
    shares = CORRECT.double().mean(-1).tolist()
    assert metric.compute().tolist() == pytest.approx(
        [statistics.fmean(shares), 1.959963984540054 * statistics.stdev(shares) / math.sqrt(5)]
    )
    alone = AvgAtK()
    alone.update(CORRECT)
    assert alone.compute() == metric.compute()[0]


def test_one_problem_has_a_mean_and_no_interval() -> None:
    metric = AvgAtK(interval=True)
    metric.update(CORRECT[:1])
    mean, half_width = metric.compute().tolist()
    assert mean == 0.25
    assert math.isnan(half_width)


@pytest.mark.parametrize("cut", range(6))
def test_ranks_add_up_however_unevenly_problems_are_dealt(cut: int) -> None:
    """The states of two ranks, summed as torchmetrics sums them when it synchronises."""

    def make() -> list[MeanOverProblems]:
        return [AvgAtK(interval=True), PassAtK(2, interval=True)]

    whole, first, second = make(), make(), make()
    for metrics, rows in ((whole, CORRECT), (first, CORRECT[:cut]), (second, CORRECT[cut:])):
        for metric in metrics:
            metric.update(rows)
    for together, one, other in zip(whole, first, second, strict=True):
        for state, reduce in one._reductions.items():
            setattr(one, state, reduce(torch.stack([getattr(one, state), getattr(other, state)])))
        one._computed = None
        torch.testing.assert_close(one.compute(), together.compute())
