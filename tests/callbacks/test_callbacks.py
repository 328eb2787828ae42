"""Metrics and pictures of the reversed signal, and the metrics of evaluations."""

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
from tests.helpers.epochs import random_epoch_record


def test_avg_and_pass_at_k_accumulate_over_batches() -> None:
    correct = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    avg, passed = AvgAtK(), PassAtK(2)
    for rows in (correct[:1], correct[1:]):
        avg.update(rows)
        passed.update(rows)
    assert avg.compute() == pytest.approx((0.25 + 0 + 1) / 3)
    assert passed.compute() == pytest.approx((0.5 + 0 + 1) / 3)


def test_signal_statistics_cover_only_the_scored_tokens() -> None:
    data = random_epoch_record()
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


def test_signal_statistics_without_context_omit_token_metrics() -> None:
    data = random_epoch_record()
    data.contexts = [None] * 12
    assert set(signal_statistics(data)) == {"signal/context", "signal/context_of_correct"}


def rollout(text: str = "x", tokens: int = 3) -> Scored:
    token = Token(text, 1.5, -2.0, -3.5, 4.5, 0.7)
    return Scored("p<1>", "<script>alert(1)</script>", "context & more", 0.7, [token] * tokens)


def test_the_page_escapes_all_text() -> None:
    page = html_page("Epoch <3>", [rollout("<b>")])
    assert "<script>" not in page
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert "D +1.50" in page


def test_the_image_limits_its_height_for_long_rollouts() -> None:
    short, long = draw("t", [rollout()]), draw("t", [rollout("word\n", 2000)])
    assert short.shape[1:] == long.shape[1:] == (1200, 3)
    assert short.shape[0] < long.shape[0] < 1000


def test_colours_distinguish_the_sign_of_the_asymmetry() -> None:
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
def test_invalid_callback_settings_are_refused(make: object) -> None:
    with pytest.raises(ConfigError):
        make()


def test_rank_guard_is_idle_when_disabled_or_with_one_rank() -> None:
    for guard, ranks in ((RankGuard(timeout_s=None), 2), (RankGuard(), 1)):
        guard.setup(cast(Any, SimpleNamespace(world_size=ranks)), cast(Any, None), "fit")
        guard.teardown(cast(Any, None), cast(Any, None), "fit")
    with pytest.raises(ConfigError, match=r"rank_guard.timeout_s is 1; it has to be at least 5, or null"):
        RankGuard(timeout_s=1)
