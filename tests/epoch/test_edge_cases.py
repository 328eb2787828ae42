"""Non-finite values, rollouts with nothing to learn from, and policies that collapse."""

from __future__ import annotations

import json
import logging
import math
import re
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
    LastDigit,
    Policy,
    Problem,
    Rollout,
    Teacher,
    TransformersEngine,
)
from rlrt_lightning.callbacks import CollapseGuard, NumberGuard
from rlrt_lightning.callbacks.collapse_guard import Curve
from rlrt_lightning.objective import Method
from rlrt_lightning.tasks.last_digit import ITEMS
from tests.helpers.command_line import cli_exit_code, weights
from tests.helpers.epochs import RuleTask, fit_and_record, weights_changed

METHODS = [GRPO(), RLRT(), SDPO(), SRPO()]
SMALL: dict[str, Any] = {"prompts_per_epoch": 8, "rollouts_per_prompt": 4}


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1)


class Poison(Callback):
    """Makes the loss or a gradient of some optimizer steps non-finite."""

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
    """Weights and optimizer state after each optimizer step, and the metrics at the end."""

    def __init__(self) -> None:
        self.states: list[list[torch.Tensor]] = []
        self.metrics: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            (optimizer,) = trainer.optimizers
            moments = [v for state in optimizer.state.values() for v in state.values()]
            self.states.append([t.detach().clone() for t in (*pl_module.policy.parameters(), *moments)])

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.metrics = {tag: float(value) for tag, value in trainer.callback_metrics.items()}

    def same(self, a: int, b: int) -> bool:
        return all(torch.equal(x, y) for x, y in zip(self.states[a], self.states[b], strict=True))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_is_skipped_and_recorded(what: str, tmp_path: Path) -> None:
    seen = Snapshots()
    callbacks = [NumberGuard(), Poison(1, 1, what), seen]
    settings_ = {**SMALL, "minibatches": 4, "accumulate": 2, "optimizer": adam}
    recorder, _ = fit_and_record(tmp_path, LastDigit(), callbacks=callbacks, **settings_)
    assert [seen.same(i, i + 1) for i in range(3)] == [True, False, False]
    assert seen.metrics["faults/skipped_steps"] == 1
    assert math.isfinite(seen.metrics["train/loss"])
    written = rows(tmp_path / "bad_numbers" / "step-2.jsonl")
    assert written[0]["bad"] == ("loss is nan" if what == "loss" else "gradient")
    epoch = recorder.epochs[0]
    known = {(epoch.problems[r.group].id, tuple(r.response_ids)): i for i, r in enumerate(epoch.rollouts)}
    for row in written:
        i = known[row["problem"], tuple(row["response_ids"])]
        assert row["advantage"] == pytest.approx(float(epoch.advantages[i]))
        assert row["prompt"]
        assert row["logp_old_max_abs"] >= 0


def test_repeated_non_finite_steps_end_the_run_which_can_be_resumed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quick = ("--trainer.max_epochs=3", "--trainer.num_sanity_val_steps=0", "--trainer.check_val_every_n_epoch=9")
    poison = ["--trainer.callbacks+=tests.epoch.test_edge_cases.Poison", "--trainer.callbacks.first=3"]
    assert cli_exit_code("fit", tmp_path, *quick, *poison) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "skipped 3 consecutive optimizer steps, up to step 6" in line
    assert "step-6.jsonl" in line
    assert sorted(path.stem for path in tmp_path.rglob("bad_numbers/*")) == ["step-4", "step-5", "step-6"]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())
    assert cli_exit_code("fit", tmp_path, *quick, "--ckpt_path=last") == 0


class Broken(Callback):
    """Sets weights of the policy to NaN."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        next(pl_module.policy.parameters()).data[0, 0] = torch.nan
        next(p for n, p in pl_module.policy.named_parameters() if "norm" in n).data[0] = torch.nan


def test_non_finite_weights_end_the_run_and_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all rollouts of epoch 1 have non-finite log-probs"):
        fit_and_record(tmp_path, LastDigit(), epochs=3, callbacks=[Broken(), NumberGuard(2)], minibatches=1)
    assert rows(tmp_path / "bad_numbers" / "epoch-1.jsonl")[0]["bad"] == "logp of the sampler is nan at token 0"
    policy = torch.nn.Linear(2, 2)
    module, trainer = cast(Any, SimpleNamespace(policy=policy)), cast(Any, SimpleNamespace(world_size=1, global_step=7))
    NumberGuard().on_save_checkpoint(trainer, module, {})
    policy.weight.data[0, 0] = torch.inf
    with pytest.raises(ConfigError, match="the policy has non-finite weights after optimizer step 7"):
        NumberGuard().on_save_checkpoint(trainer, module, {})


class BadSampler(TransformersEngine):
    """Returns a NaN log-prob in the first rollout of each prompt."""

    def generate(self, *args: Any) -> Iterator[Rollout]:
        for rollout in super().generate(*args):
            if rollout.index == 0:
                rollout.logp_sampler[-1] = torch.nan
            yield rollout


@pytest.mark.parametrize("method", [RLRT(), SRPO(), EntropyBonus(coef=0.01)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("rescore", [False, True])
def test_rollouts_with_non_finite_log_probs_are_masked(method: Method, rescore: bool, tmp_path: Path) -> None:
    seen = Snapshots()
    recorder, module = fit_and_record(
        tmp_path,
        LastDigit(),
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
    assert seen.metrics["faults/rollouts"] == 8
    assert seen.metrics["faults/skipped_steps"] == 0
    assert all(math.isfinite(value) for value in seen.metrics.values())
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert weights_changed(module)
    assert {row["problem"] for row in rows(tmp_path / "bad_numbers" / "epoch-1.jsonl")} == {
        p.id for p in epoch.problems
    }


def test_non_finite_teacher_scores_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = Teacher.score
    monkeypatch.setattr(Teacher, "score", lambda *args, **kw: _with_infinite_logp(*score(*args, **kw)))
    recorder, _ = fit_and_record(tmp_path, LastDigit(), epochs=2, **SMALL)
    epoch = next(epoch for epoch in recorder.epochs if epoch.faults)
    assert set(epoch.faults.values()) == {"the teacher's logp is -inf at token 0"}
    for i in epoch.faults:
        assert not epoch.has_context[i]
        alone = epoch.credit.advantages[i][epoch.mask[i]]
        assert torch.equal(alone, epoch.advantages[i].expand_as(alone)), "weight 1"


def _with_infinite_logp(scores: list[Any], truncated: int) -> tuple[list[Any], int]:
    for score in scores:
        if score is not None:
            score.logp[0] = -torch.inf
    return scores, truncated


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_an_epoch_without_signal_after_a_normal_one_changes_no_weight(method: Method, tmp_path: Path) -> None:
    wrong: set[str] = set()
    task = RuleTask(lambda text: not wrong and "1" in text)

    class Fail(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            wrong.add("all")

    seen = Snapshots()
    recorder, _ = fit_and_record(tmp_path, task, epochs=2, method=method, callbacks=[Fail(), seen], **SMALL)
    assert recorder.epochs[0].credit.trains.any()
    assert not recorder.epochs[1].credit.trains.any()
    assert seen.same(-1, 1), "plain SGD leaves the weights unchanged"
    assert seen.metrics["train/empty_steps"] == 2
    assert seen.metrics["faults/skipped_steps"] == 0


class ShortResponses(TransformersEngine):
    """The first `empty` rollouts of each prompt are empty, and the next one has one token."""

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
def test_empty_and_one_token_responses_train_without_non_finite_values(
    method: Method, rescore: bool, tmp_path: Path
) -> None:
    task, seen = RuleTask(lambda text: "1" in text), Snapshots()
    parts = {"method": method, "accumulate": 3, "callbacks": [seen], "rescore": rescore, **SMALL}
    recorder, module = fit_and_record(tmp_path, task, engine=ShortResponses(2), **parts)
    epoch = recorder.epochs[0]
    lengths = epoch.mask.sum(-1)
    assert sorted(set(lengths.tolist()))[:2] == [0, 1]
    assert (epoch.advantages[lengths == 0] != 0).any(), "empty responses count in their group"
    assert not epoch.credit.trains[lengths == 0].any()
    assert all(math.isfinite(value) for value in seen.metrics.values())
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert weights_changed(module)


def test_an_epoch_of_empty_responses_changes_no_weight(tmp_path: Path) -> None:
    seen = Snapshots()
    recorder, module = fit_and_record(
        tmp_path, RuleTask(lambda text: "1" in text), callbacks=[seen], engine=ShortResponses(9), **SMALL
    )
    assert not recorder.epochs[0].mask.any()
    assert seen.metrics["train/empty_steps"] == 2
    assert not weights_changed(module)


class OneToken(RuleTask):
    """Prompts of one token, and empty prompts beyond the eighth."""

    def problems(self, split: str) -> Sequence[Problem]:
        prompts = [*(f" {item}" for item in ITEMS), ""]
        return [Problem(f"p{i}", prompts[i], "6") for i in range(self.size)]


def test_one_token_prompts_train_and_empty_prompts_are_refused(tmp_path: Path) -> None:
    recorder, module = fit_and_record(
        tmp_path, OneToken(lambda text: len(text) % 2), policy=Policy(chat=False), **SMALL
    )
    assert {len(r.prompt_ids) for r in recorder.epochs[0].rollouts} == {1}
    assert weights_changed(module)
    with pytest.raises(ConfigError, match="problem p8: its prompt has no tokens"):
        fit_and_record(tmp_path, OneToken(bool, size=9), policy=Policy(chat=False), overlong_prompts="error")


# -- the collapse guard --------------------------------------------------------------------------------------------

values = st.lists(st.floats(0, 1), min_size=1, max_size=30)
quick = settings(max_examples=50, derandomize=True, deadline=None)


@quick
@given(values, st.integers(1, 8))
def test_a_curve_averages_its_first_and_its_newest_window(given_: list[float], window: int) -> None:
    curve = Curve(window)
    for i, value in enumerate(given_, 1):
        means = curve.add(value)
        assert (means is None) == (i < 2 * window)
    if means is not None:
        first, last = given_[:window], given_[-window:]
        assert means == pytest.approx((sum(first) / window, sum(last) / window))


def watch(guard: CollapseGuard, entropy: Sequence[float], length: Sequence[float], truncated: Sequence[float]) -> bool:
    """Feeds the guard the metrics of some epochs; returns whether it stops the run."""
    data = SimpleNamespace(sampling=SimpleNamespace(max_new_tokens=100), rollout_metrics={})
    trainer = cast(Any, SimpleNamespace(datamodule=data, should_stop=False, is_global_zero=True, current_epoch=0))
    for e, n, t in zip(entropy, length, truncated, strict=True):
        data.rollout_metrics = {"rollout/entropy": e, "rollout/length": n, "rollout/truncated": t}
        guard.on_train_epoch_end(trainer, cast(Any, None))
    return bool(trainer.should_stop)


@quick
@given(st.lists(st.floats(0.01, 1), min_size=30, max_size=30), st.lists(st.floats(1, 79), min_size=30, max_size=30))
def test_falling_entropy_and_growing_responses_are_no_collapse(entropy: list[float], length: list[float]) -> None:
    guard = CollapseGuard("stop", window=3)
    assert not watch(guard, sorted(entropy, reverse=True), sorted(length), [0.1] * 30)


@quick
@given(st.integers(0, 29), st.floats(0.06, 2), st.sampled_from(["entropy", "length", "truncated"]))
def test_a_collapse_is_detected_across_a_resume(cut: int, start: float, which: str) -> None:
    ends = {"entropy": 3 * start, "length": 95.0, "truncated": 0.9}
    curves = {"entropy": [start] * 30, "length": [20.0] * 30, "truncated": [0.0] * 30}
    curves[which][15:] = [ends[which]] * 15
    guard, resumed = CollapseGuard("stop", window=4), CollapseGuard("stop", window=4)
    stopped = watch(guard, *(curve[:cut] for curve in curves.values()))
    resumed.load_state_dict(guard.state_dict())
    assert stopped or watch(resumed, *(curve[cut:] for curve in curves.values()))
    assert not watch(resumed, *curves.values()), "it stops only once"


def test_a_collapse_warns_once_or_stops_the_run_after_its_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for action, epochs in (("warn", 4), ("stop", 2), (None, 4)):
        caplog.clear()
        guard = CollapseGuard(cast(Any, action), window=1, entropy_floor=100.0)
        small = {"prompts_per_epoch": 2, "rollouts_per_prompt": 2}
        recorder, _ = fit_and_record(tmp_path, LastDigit(), epochs=4, callbacks=[guard], **small)
        assert len(recorder.epochs) == epochs
        assert caplog.text.count("may be collapsing: rollout/entropy has gone from") == (action is not None)


class WithoutEntropies(TransformersEngine):
    """Returns log-probs only, as vLLM does, and keeps the entropies for the test."""

    def __init__(self) -> None:
        super().__init__()
        self.entropies: list[torch.Tensor] = []
        self.logp: list[torch.Tensor] = []

    def generate(self, *args: Any) -> Iterator[Rollout]:
        for rollout in super().generate(*args):
            assert rollout.entropy is not None
            self.entropies.append(rollout.entropy)
            self.logp.append(rollout.logp_sampler)
            rollout.entropy = None
            yield rollout


def test_an_engine_without_entropies_has_them_estimated_for_the_guard_and_the_epochs_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, guard = WithoutEntropies(), CollapseGuard("stop", window=1, entropy_floor=100.0)
    # Without learning, also where nothing is trained on: all rollouts count, not only those of mixed groups.
    wrong = RuleTask(lambda text: False)
    recorder, _ = fit_and_record(
        tmp_path, wrong, epochs=4, callbacks=[guard], engine=engine, prompts_per_epoch=6, rollouts_per_prompt=64
    )
    assert len(recorder.epochs) == 2, "stopped by the guard"
    assert "may be collapsing: rollout/entropy has gone from" in caplog.text
    half = len(engine.logp) // 2
    for epoch, line in enumerate(re.findall(r"^epoch .*entropy (\S+)", capsys.readouterr().out, flags=re.M)):
        rows = slice(epoch * half, (epoch + 1) * half)
        logged, tokens = recorder.metrics[epoch]["rollout/entropy"], torch.cat(engine.logp[rows])
        assert logged == pytest.approx(-float(tokens.mean()))
        assert float(line) == pytest.approx(logged, abs=0.006)
        difference = torch.cat(engine.entropies[rows]) + tokens
        assert abs(float(difference.mean())) < 4 * float(difference.std()) / len(tokens) ** 0.5, "an unbiased estimate"
    assert epoch == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NumberGuard(patience=0), "number_guard.patience is 0"),
        (lambda: CollapseGuard(window=0), "collapse_guard.window is 0"),
        (lambda: CollapseGuard(entropy_rise=1.0), "collapse_guard.entropy_rise is 1.0"),
        (lambda: CollapseGuard(entropy_floor=0.0), "collapse_guard.entropy_floor is 0.0"),
        (lambda: CollapseGuard(length=1.0), "collapse_guard.length is 1.0"),
        (lambda: CollapseGuard(truncated=0.0), "collapse_guard.truncated is 0.0"),
    ],
)
def test_invalid_guard_settings_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
