"""Metrics and pictures of the reversed signal, and the metrics of evaluations."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from rlrt_lightning.callbacks import Evaluation, RankGuard, ReversedSignalLogger, TeacherRefresh
from rlrt_lightning.callbacks.reversed_signal import choose, make_picture, signal_statistics
from rlrt_lightning.callbacks.signal_picture import Picture, Scored, Token, colour, draw, effects, explain, html_page
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


def token(text: str = "x", asymmetry: float = 1.5, advantage: float = 0.9) -> Token:
    return Token(text, asymmetry, -2.0, -2.0 - asymmetry, 4.5, advantage)


def picture(text: str = "x", tokens: int = 3) -> Picture:
    rollout = Scored("p<1>", "<script>alert(1)</script>", "context & more", 0.6, [token(text)] * tokens)
    return Picture("Epoch <3>", "the <largest>", "more", "less", [rollout])


def test_the_page_escapes_all_text() -> None:
    page = html_page(picture("<b>"))
    for markup in ("<script>", "<b>", "<largest>", "<3>"):
        assert markup not in page
    assert "&lt;b&gt;" in page
    assert "D +1.50" in page


def test_tokens_that_no_teacher_scored_have_no_values_in_the_page() -> None:
    plain = Scored("p", "prompt", None, 0.6, [token(asymmetry=0.0)])
    page = html_page(Picture("t", "r", "more", "less", [plain]))
    assert "log P_T" not in page
    assert "only the teacher saw" not in page


def test_the_image_limits_its_height_for_long_rollouts() -> None:
    short, long = draw(picture()), draw(picture("word\n", 2000))
    assert short.shape[1:] == long.shape[1:] == (1200, 3)
    assert short.shape[0] < long.shape[0] < 1000


def test_long_prompts_and_words_stay_within_the_image() -> None:
    rollout = Scored("p", "w" * 5000, "many words " * 999, 0.6, [token("a" * 40)] * 50)
    image = draw(Picture("t", "r", "more", "less", [rollout]))
    assert image.shape[0] < 1000
    assert (image[:, -10:] == 255).all(), "the right margin is empty"


def test_the_image_explains_the_colours_of_its_words() -> None:
    def blobs(asymmetry: float) -> set[tuple[int, ...]]:
        rollout = Scored("p", "prompt", "context", 0.6, [token("word", asymmetry)])
        image = draw(Picture("t", "r", *effects([rollout]), [rollout]))
        return {tuple(int(value) for value in pixel) for pixel in image.reshape(-1, 3)}

    against, with_ = colour(9.0), colour(-9.0)
    assert {colour(1.0), against} <= blobs(1.0)
    assert {colour(-1.0), with_} <= blobs(-1.0)
    assert not {against, with_} & blobs(0.01), "nothing is coloured, so there is nothing to explain"


def test_the_explanation_names_the_strongest_token_with_its_probabilities() -> None:
    words = [token(" the", 0.2), Token(" skip", 1.0, math.log(0.52), math.log(0.029), 9.0, 0.9), token(":", -0.1)]
    text = explain(Scored("p", "prompt", "context", 0.6, words))
    assert text == "“skip”: 52 % for the student, 2.9 % for the teacher; its credit is 1.50 times the rollout's"
    assert "below 0.1 %" in explain(Scored("p", "prompt", "context", 0.6, [token("x", 20.0)]))
    assert explain(Scored("p", "prompt", "context", 0.6, [token("x", 0.01)])) == ""


def test_the_colours_are_explained_by_what_the_method_did() -> None:
    def effect(up: float, down: float) -> tuple[str, str]:
        return effects([Scored("p", "prompt", "context", 0.6, [token("x", 1.0, up), token("y", -1.0, down)])])

    assert effect(0.9, 0.3) == ("more credit", "less credit")
    assert effect(0.3, 0.9) == ("less credit", "more credit")
    assert effect(0.6, 0.6) == ("the same credit", "the same credit")
    assert effects([Scored("p", "prompt", "context", 0.6, [token("x", 1.0, 0.9)])]) == ("more credit", "")


def judged_record(contexts: list[str | None]) -> Any:
    """A random record of 12 rollouts; reward 1 is correct."""
    data = random_epoch_record()
    data.contexts = contexts
    data.credit = replace(data.credit, asymmetry=data.credit.asymmetry * data.has_context[:, None])
    for reward, rollout in zip(data.rewards.tolist(), data.rollouts, strict=True):
        rollout.verdict = Verdict(reward, reward == 1)
    return data


def test_the_picture_shows_the_largest_difference_of_each_problem() -> None:
    data = judged_record([None if i % 3 == 1 else "x" for i in range(12)])
    candidates = [i for i in range(12) if data.rewards[i] == 1 and i % 3 != 1]
    size = {i: float(data.credit.asymmetry[i].abs().max()) for i in candidates}
    groups: dict[int, list[int]] = {}
    for i in candidates:
        groups.setdefault(data.rollouts[i].group, []).append(i)
    best = [max(rows, key=size.__getitem__) for rows in groups.values()]
    assert len(best) > 1
    assert len(candidates) > len(best)
    assert choose(data, 9) == sorted(best, key=lambda i: -size[i])
    assert choose(data, 1) == choose(data, 9)[:1]


def test_the_picture_says_why_nothing_is_coloured() -> None:
    def remark(data: Any, context: str) -> str:
        policy = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids, **_: "x"))
        module = SimpleNamespace(method=SimpleNamespace(context=context), policy=policy)
        return make_picture(cast(Any, module), data, "t", 6).remark

    data = judged_record(["x"] * 12)
    assert "largest |D|" in remark(data, "sibling")
    data.credit = replace(data.credit, asymmetry=torch.zeros_like(data.credit.asymmetry))
    assert "agree on every word" in remark(data, "sibling")
    data.contexts = [None] * 12
    assert "scored none of them" in remark(data, "sibling")
    assert "has no teacher" in remark(data, "none")
    for rollout in data.rollouts:
        rollout.verdict = Verdict(0.0, False)
    assert remark(data, "sibling") == "No rollout of this epoch was correct."


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
