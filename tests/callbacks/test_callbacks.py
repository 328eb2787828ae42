"""Figures and pictures of the reversed signal, and the metrics of the evaluation."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from rlrt_lightning.callbacks import Evaluation, RankGuard, ReversedSignalLogger, TeacherRefresh
from rlrt_lightning.callbacks.reversed_signal import signal_statistics
from rlrt_lightning.callbacks.signal_picture import Scored, Token, colour, draw, html_page
from rlrt_lightning.evaluation.metrics import AvgAtK, PassAtK
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.tasks import Verdict
from tests.helpers.epochs import epoch


def test_avg_and_pass_at_k_add_up_over_batches() -> None:
    correct = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    avg, passed = AvgAtK(), PassAtK(2)
    for rows in (correct[:1], correct[1:]):
        avg.update(rows)
        passed.update(rows)
    assert avg.compute() == pytest.approx((0.25 + 0 + 1) / 3)
    assert passed.compute() == pytest.approx((0.5 + 0 + 1) / 3)


def test_signal_statistics_are_those_of_the_scored_tokens() -> None:
    data = epoch()
    data.contexts = [None if i % 2 else "x" for i in range(12)]
    asymmetry = data.credit.asymmetry * data.has_context[:, None]
    data.credit = replace(data.credit, asymmetry=asymmetry, weight_bounds=(0.8, 1.2))
    for i, rollout in enumerate(data.rollouts):
        rollout.verdict = Verdict(float(data.rewards[i]), bool(data.rewards[i]))
    stats = signal_statistics(data)
    scored = [(i, t) for i in range(0, 12, 2) for t in range(len(data.rollouts[i].response_ids))]
    weights = [float(data.credit.weights[i, t]) for i, t in scored]
    assert stats["signal/context"] == 0.5
    assert stats["signal/up_weighted"] == pytest.approx(sum(w > 1 for w in weights) / len(weights))
    assert stats["signal/clipped"] == pytest.approx(sum(not 0.8 <= w <= 1.2 for w in weights) / len(weights))
    right = [float(data.credit.asymmetry[i, t]) for i, t in scored if data.rewards[i] == 1]
    assert stats["signal/asymmetry_correct"] == pytest.approx(sum(right) / len(right), abs=1e-6)
    assert all(math.isfinite(value) for value in stats.values())


def test_a_batch_without_context_has_no_nan() -> None:
    data = epoch()
    data.contexts = [None] * 12
    assert set(signal_statistics(data)) == {"signal/context", "signal/context_of_correct"}


def rollout(text: str = "x", tokens: int = 3) -> Scored:
    token = Token(text, 1.5, -2.0, -3.5, 4.5, 0.7)
    return Scored("p<1>", "<script>alert(1)</script>", "context & more", 0.7, [token] * tokens)


def test_the_page_takes_no_text_for_markup() -> None:
    page = html_page("Epoch <3>", [rollout("<b>")])
    assert "<script>" not in page
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert "D +1.50" in page


def test_the_image_holds_long_rollouts_and_line_breaks() -> None:
    short, long = draw("t", [rollout()]), draw("t", [rollout("word\n", 2000)])
    assert short.shape[1:] == long.shape[1:] == (1200, 3)
    assert short.shape[0] < long.shape[0] < 1000


def test_colours_tell_the_directions_apart() -> None:
    against, neutral, with_ = colour(3.0), colour(0.0), colour(-3.0)
    assert neutral == (255, 255, 255)
    assert against[0] > against[2]
    assert with_[0] < with_[2]
    assert colour(100.0) == against


@pytest.mark.parametrize(
    "make",
    [
        lambda: TeacherRefresh(every_n_epochs=0),
        lambda: TeacherRefresh(ema_decay=1.0),
        lambda: TeacherRefresh(every_n_epochs=None, ema_decay=0.5),
        lambda: ReversedSignalLogger(rollouts=0),
        lambda: ReversedSignalLogger(picture_every_n_epochs=-1),
        lambda: Evaluation(ks=[]),
        lambda: Evaluation(table=-1),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: object) -> None:
    with pytest.raises(ConfigError):
        make()


def test_nobody_is_watched_where_that_is_turned_off_or_there_is_one_rank() -> None:
    for guard, ranks in ((RankGuard(timeout_s=None), 2), (RankGuard(), 1)):
        guard.setup(cast(Any, SimpleNamespace(world_size=ranks)), cast(Any, None), "fit")
        guard.teardown(cast(Any, None), cast(Any, None), "fit")
    with pytest.raises(ConfigError, match=r"rank_guard.timeout_s is 1; it has to be at least 5, or null"):
        RankGuard(timeout_s=1)
