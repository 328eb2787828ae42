"""Numbers that are not finite, rollouts with nothing to teach, and policies that run away."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Callback

from rlrt_lightning import (
    GRPO,
    RLRT,
    SDPO,
    SRPO,
    ConfigError,
    EntropyBonus,
    Policy,
    Problem,
    Rollout,
    StrategySum,
    Teacher,
    TransformersEngine,
)
from rlrt_lightning.callbacks import CollapseGuard, NumberGuard
from rlrt_lightning.callbacks.collapse_guard import Curve
from rlrt_lightning.objective import Method
from tests.helpers.command_line import command, weights
from tests.helpers.epochs import Counted, fit, moved

METHODS = [GRPO(), RLRT(), SDPO(), SRPO()]
SMALL: dict[str, Any] = {"prompts_per_epoch": 8, "rollouts_per_prompt": 4}


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1)


class Poison(Callback):
    """Makes loss or gradients of some optimizer steps NaN."""

    def __init__(self, first: int = 0, last: int = 99, what: str = "loss") -> None:
        self.first, self.last, self.what = first, last, what

    def _now(self, trainer: Any) -> bool:
        return self.first <= trainer.global_step <= self.last

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._now(trainer) and self.what == "loss" and batch_idx % trainer.accumulate_grad_batches == 0:
            batch.logp_old = torch.full_like(batch.logp_old, torch.nan)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self._now(trainer) and self.what == "gradient":
            next(p for p in pl_module.policy.parameters() if p.grad is not None).grad.fill_(torch.inf)


class Snapshots(Callback):
    """Weights and optimizer state after each optimizer step, and each epoch's figures."""

    def __init__(self) -> None:
        self.states: list[list[torch.Tensor]] = []
        self.figures: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            (optimizer,) = trainer.optimizers
            moments = [v for state in optimizer.state.values() for v in state.values()]
            self.states.append([t.detach().clone() for t in (*pl_module.policy.parameters(), *moments)])

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.figures = {tag: float(value) for tag, value in trainer.callback_metrics.items()}

    def same(self, a: int, b: int) -> bool:
        return all(torch.equal(x, y) for x, y in zip(self.states[a], self.states[b], strict=True))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_step_leaves_weights_and_moments_and_is_written_down(what: str, tmp_path: Path) -> None:
    seen = Snapshots()
    callbacks = [NumberGuard(), Poison(1, 1, what), seen]
    settings_ = {**SMALL, "minibatches": 4, "accumulate": 2, "optimizer": adam}
    recorder, _ = fit(tmp_path, StrategySum(), callbacks=callbacks, **settings_)
    assert [seen.same(i, i + 1) for i in range(3)] == [True, False, False]
    assert seen.figures["faults/skipped_steps"] == 1
    assert math.isfinite(seen.figures["train/loss"])
    written = rows(tmp_path / "bad_numbers" / "step-2.jsonl")
    assert written[0]["bad"] == ("loss is nan" if what == "loss" else "gradient")
    epoch = recorder.epochs[0]
    known = {(epoch.problems[r.group].id, tuple(r.response_ids)): i for i, r in enumerate(epoch.rollouts)}
    for row in written:
        i = known[row["problem"], tuple(row["response_ids"])]
        assert row["advantage"] == pytest.approx(float(epoch.advantages[i]))
        assert row["prompt"]
        assert row["logp_old_max_abs"] >= 0


def test_too_many_bad_steps_end_the_run_which_can_be_resumed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quick = ("--trainer.max_epochs=3", "--trainer.num_sanity_val_steps=0", "--trainer.check_val_every_n_epoch=9")
    poison = ["--trainer.callbacks+=tests.epoch.test_edge_cases.Poison", "--trainer.callbacks.first=3"]
    assert command("fit", tmp_path, *quick, *poison) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "skipped 3 consecutive optimizer steps, up to step 6" in line
    assert "step-6.jsonl" in line
    assert sorted(path.stem for path in tmp_path.rglob("bad_numbers/*")) == ["step-4", "step-5", "step-6"]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())
    assert command("fit", tmp_path, *quick, "--ckpt_path=last") == 0


class Broken(Callback):
    """A weight that is not a number."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        next(pl_module.policy.parameters()).data[0, 0] = torch.nan
        next(p for n, p in pl_module.policy.named_parameters() if "norm" in n).data[0] = torch.nan


def test_weights_that_are_not_finite_end_the_run_and_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all rollouts of epoch 0 have non-finite log-probs"):
        fit(tmp_path, StrategySum(), epochs=3, callbacks=[Broken(), NumberGuard(2)], minibatches=1)
    assert rows(tmp_path / "bad_numbers" / "epoch-0.jsonl")[0]["bad"] == "logp of the sampler is nan at token 0"
    policy = torch.nn.Linear(2, 2)
    module, trainer = cast(Any, SimpleNamespace(policy=policy)), cast(Any, SimpleNamespace(world_size=1, global_step=7))
    NumberGuard().on_save_checkpoint(trainer, module, {})
    policy.weight.data[0, 0] = torch.inf
    with pytest.raises(ConfigError, match="the policy has non-finite weights after optimizer step 7"):
        NumberGuard().on_save_checkpoint(trainer, module, {})


class BadSampler(TransformersEngine):
    """Gives a log-prob that is not a number with the first rollout of each prompt."""

    def generate(self, *args: Any) -> Iterator[Rollout]:
        for rollout in super().generate(*args):
            if rollout.index == 0:
                rollout.logp_sampler[-1] = torch.nan
            yield rollout


@pytest.mark.parametrize("method", [RLRT(), SRPO(), EntropyBonus(coef=0.01)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("rescore", [False, True])
def test_rollouts_with_bad_log_probs_are_taken_out(method: Method, rescore: bool, tmp_path: Path) -> None:
    seen = Snapshots()
    recorder, module = fit(
        tmp_path,
        StrategySum(),
        method=method,
        callbacks=[NumberGuard(), seen],
        engine=BadSampler(),
        rescore=rescore,
        **SMALL,
    )
    epoch = recorder.epochs[0]
    first = torch.tensor([r.index == 0 for r in epoch.rollouts])
    bad = torch.tensor([i in epoch.faults for i in range(32)])
    assert torch.equal(bad, first)
    assert not (epoch.credit.trains & bad).any()
    assert seen.figures["faults/rollouts"] == 8
    assert seen.figures["faults/skipped_steps"] == 0
    assert all(math.isfinite(value) for value in seen.figures.values())
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert moved(module)
    assert {row["problem"] for row in rows(tmp_path / "bad_numbers" / "epoch-0.jsonl")} == {
        p.id for p in epoch.problems
    }


def test_a_teacher_that_says_no_number_is_not_listened_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = Teacher.score
    monkeypatch.setattr(Teacher, "score", lambda *args, **kw: _infinite(*score(*args, **kw)))
    recorder, _ = fit(tmp_path, StrategySum(), epochs=2, **SMALL)
    epoch = next(epoch for epoch in recorder.epochs if epoch.faults)
    assert set(epoch.faults.values()) == {"the teacher's logp is -inf at token 0"}
    for i in epoch.faults:
        assert not epoch.has_context[i]
        alone = epoch.credit.advantages[i][epoch.mask[i]]
        assert torch.equal(alone, epoch.advantages[i].expand_as(alone)), "weight 1"


def _infinite(scores: list[Any], truncated: int) -> tuple[list[Any], int]:
    for score in scores:
        if score is not None:
            score.logp[0] = -torch.inf
    return scores, truncated


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_an_epoch_with_nothing_to_learn_after_one_with_something(method: Method, tmp_path: Path) -> None:
    wrong: set[str] = set()
    task = Counted(lambda text: not wrong and "1" in text)

    class Fail(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            wrong.add("from here on")

    seen = Snapshots()
    recorder, _ = fit(tmp_path, task, epochs=2, method=method, callbacks=[Fail(), seen], **SMALL)
    assert recorder.epochs[0].credit.trains.any()
    assert not recorder.epochs[1].credit.trains.any()
    assert seen.same(-1, 1), "plain gradient descent stays where it is"
    assert seen.figures["train/empty_steps"] == 2
    assert seen.figures["faults/skipped_steps"] == 0


class Short(TransformersEngine):
    """The first so many rollouts of each prompt are empty, the next one has one token."""

    def __init__(self, empty: int) -> None:
        super().__init__()
        self.empty = empty

    def generate(self, *args: Any) -> Iterator[Rollout]:
        for rollout in super().generate(*args):
            if rollout.index <= self.empty:
                n = int(rollout.index == self.empty)
                rollout.response_ids, rollout.logp_sampler = rollout.response_ids[:n], rollout.logp_sampler[:n]
                rollout.entropy = rollout.entropy[:n] if rollout.entropy is not None else None
                rollout.text = "1" if rollout.index % 2 else ""
            yield rollout


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("rescore", [False, True])
def test_empty_responses_and_responses_of_one_token(method: Method, rescore: bool, tmp_path: Path) -> None:
    task, seen = Counted(lambda text: "1" in text), Snapshots()
    parts = {"method": method, "accumulate": 3, "callbacks": [seen], "rescore": rescore, **SMALL}
    recorder, module = fit(tmp_path, task, engine=Short(2), **parts)
    epoch = recorder.epochs[0]
    lengths = epoch.mask.sum(-1)
    assert sorted(set(lengths.tolist()))[:2] == [0, 1]
    assert (epoch.advantages[lengths == 0] != 0).any(), "it counts in its group"
    assert not epoch.credit.trains[lengths == 0].any()
    assert all(math.isfinite(value) for value in seen.figures.values())
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert moved(module)


def test_an_epoch_of_empty_responses_changes_nothing(tmp_path: Path) -> None:
    seen = Snapshots()
    recorder, module = fit(tmp_path, Counted(lambda text: "1" in text), callbacks=[seen], engine=Short(9), **SMALL)
    assert not recorder.epochs[0].mask.any()
    assert seen.figures["train/empty_steps"] == 2
    assert not moved(module)


class OneToken(Counted):
    """Prompts of one token, or of none."""

    def problems(self, split: str) -> Sequence[Problem]:
        return [Problem(f"p{i}", "abcdefgh"[i : i + 1], "6") for i in range(self.size)]


def test_prompts_of_one_token_train_and_those_of_none_are_refused(tmp_path: Path) -> None:
    recorder, module = fit(tmp_path, OneToken(lambda text: len(text) % 2), policy=Policy(chat=False), **SMALL)
    assert {len(r.prompt_ids) for r in recorder.epochs[0].rollouts} == {1}
    assert moved(module)
    with pytest.raises(ConfigError, match="problem p8: its prompt has no tokens"):
        fit(tmp_path, OneToken(bool, size=9), policy=Policy(chat=False), overlong_prompts="error")


# -- the collapse guard --------------------------------------------------------------------------------------------

values = st.lists(st.floats(0, 1), min_size=1, max_size=30)
quick = settings(max_examples=50, derandomize=True, deadline=None)


@quick
@given(values, st.integers(1, 8))
def test_a_curve_gives_the_means_of_its_first_and_its_newest_values(given_: list[float], window: int) -> None:
    curve = Curve(window)
    for i, value in enumerate(given_, 1):
        means = curve.add(value)
        assert (means is None) == (i < 2 * window)
    if means is not None:
        first, last = given_[:window], given_[-window:]
        assert means == pytest.approx((sum(first) / window, sum(last) / window))


def watch(guard: CollapseGuard, entropy: Sequence[float], length: Sequence[float], truncated: Sequence[float]) -> bool:
    """Shows the guard some epochs; whether it ends the run."""
    data = SimpleNamespace(sampling=SimpleNamespace(max_new_tokens=100), rollout_metrics={})
    trainer = cast(Any, SimpleNamespace(datamodule=data, should_stop=False, is_global_zero=True, current_epoch=0))
    for e, n, t in zip(entropy, length, truncated, strict=True):
        data.rollout_metrics = {"rollout/entropy": e, "rollout/length": n, "rollout/truncated": t}
        guard.on_train_epoch_end(trainer, cast(Any, None))
    return bool(trainer.should_stop)


@quick
@given(st.lists(st.floats(0.01, 1), min_size=30, max_size=30), st.lists(st.floats(1, 79), min_size=30, max_size=30))
def test_falling_entropy_and_responses_that_grow_within_their_limit_are_no_collapse(
    entropy: list[float], length: list[float]
) -> None:
    guard = CollapseGuard("stop", window=3)
    assert not watch(guard, sorted(entropy, reverse=True), sorted(length), [0.1] * 30)


@quick
@given(st.integers(0, 29), st.floats(0.06, 2), st.sampled_from(["entropy", "length", "truncated"]))
def test_a_curve_that_runs_away_is_seen_also_after_a_resume(cut: int, start: float, which: str) -> None:
    ends = {"entropy": 3 * start, "length": 95.0, "truncated": 0.9}
    curves = {"entropy": [start] * 30, "length": [20.0] * 30, "truncated": [0.0] * 30}
    curves[which][15:] = [ends[which]] * 15
    guard, resumed = CollapseGuard("stop", window=4), CollapseGuard("stop", window=4)
    stopped = watch(guard, *(curve[:cut] for curve in curves.values()))
    resumed.load_state_dict(guard.state_dict())
    assert stopped or watch(resumed, *(curve[cut:] for curve in curves.values()))
    assert not watch(resumed, *curves.values()), "once is enough"


def test_a_collapse_is_said_once_or_ends_the_run_after_its_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for action, epochs in (("warn", 4), ("stop", 2), (None, 4)):
        caplog.clear()
        guard = CollapseGuard(cast(Any, action), window=1, entropy_floor=100.0)
        small = {"prompts_per_epoch": 2, "rollouts_per_prompt": 2}
        recorder, _ = fit(tmp_path, StrategySum(), epochs=4, callbacks=[guard], **small)
        assert len(recorder.epochs) == epochs
        assert caplog.text.count("may be collapsing: rollout/entropy has gone from") == (action is not None)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: NumberGuard(patience=0), "number_guard.patience is 0"),
        (lambda: CollapseGuard(window=0), "collapse_guard.window is 0"),
        (lambda: CollapseGuard(entropy_rise=1.0), "collapse_guard.entropy_rise is 1.0"),
        (lambda: CollapseGuard(entropy_floor=0.0), "collapse_guard.entropy_floor is 0.0"),
        (lambda: CollapseGuard(length=1.0), "collapse_guard.length is 1.0"),
        (lambda: CollapseGuard(truncated=0.0), "collapse_guard.truncated is 0.0"),
    ],
)
def test_settings_of_the_guards_are_checked(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()
