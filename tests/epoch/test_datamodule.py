"""The data module: the order of problems, verifier faults, and epochs with nothing to learn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from rlrt_lightning import (
    Benchmark,
    ConfigError,
    LastDigit,
    Policy,
    RLRTModule,
    Rollout,
    RolloutDataModule,
    Sampling,
    Teacher,
    TransformersEngine,
    VllmServerEngine,
)
from rlrt_lightning.objective import SDPO, EntropyBonus, Method
from tests.helpers.epochs import RuleTask, fit_and_record, weights_changed


def test_every_problem_is_drawn_once_before_any_is_repeated(tmp_path: Path) -> None:
    recorder, _ = fit_and_record(tmp_path, RuleTask(lambda text: "1" in text), epochs=7)
    drawn = [problem.id for epoch in recorder.epochs for problem in epoch.problems]
    rounds = [drawn[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(r) == [f"p{i}" for i in range(7)] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1, "each round has its own order"


def test_the_teacher_scores_only_rollouts_whose_credit_it_can_change(tmp_path: Path) -> None:
    recorder, _ = fit_and_record(tmp_path, LastDigit(), epochs=3, prompts_per_epoch=16, rollouts_per_prompt=8)
    for epoch in recorder.epochs:
        scored = epoch.has_context
        assert scored.any()
        assert (epoch.rewards[scored] == 1).all()
        assert (epoch.advantages[scored] != 0).all()
        assert not epoch.credit.asymmetry[~scored].any()


@pytest.mark.parametrize("outcome", [True, False])
def test_an_epoch_of_equal_rewards_changes_no_weight(outcome: bool, tmp_path: Path) -> None:
    recorder, module = fit_and_record(tmp_path, RuleTask(lambda _: outcome), accumulate=3)
    assert recorder.metrics[0][f"groups/all_{'correct' if outcome else 'wrong'}"] == 1
    assert not weights_changed(module)


def test_more_micro_batches_than_rollouts_keep_weights_finite(tmp_path: Path) -> None:
    _, module = fit_and_record(
        tmp_path, RuleTask(lambda text: len(text) % 2), accumulate=40, prompts_per_epoch=2, rollouts_per_prompt=2
    )
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_the_number_of_micro_batches_does_not_change_the_update(tmp_path: Path) -> None:
    weights, small = [], {"prompts_per_epoch": 8, "minibatches": 2, "max_prompt_tokens": 64}
    for accumulate, tokens in ((1, None), (3, None), (1, 120)):
        _, module = fit_and_record(tmp_path, LastDigit(), accumulate=accumulate, tokens_per_pass=tokens, **small)
        assert weights_changed(module)
        weights.append([p.detach().clone() for p in module.policy.parameters()])
    for one, *others in zip(*weights, strict=True):
        for other in others:
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_verifier_faults_count_as_wrong_until_they_exceed_max_fault_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def rule(text: str) -> bool:
        if text.startswith("skip"):
            raise KeyError("no such way")
        return "1" in text

    recorder, _ = fit_and_record(tmp_path, RuleTask(rule), epochs=3, prompts_per_epoch=6, rollouts_per_prompt=8)
    faulty = [r for epoch in recorder.epochs for r in epoch.rollouts if r.verdict.fault]
    assert faulty
    assert all(r.verdict.reward == 0 and not r.verdict.correct for r in faulty)
    assert "p" in caplog.text
    assert "no such way" in caplog.text
    with pytest.raises(ConfigError, match=r"failed on 16 of 16 .* data.max_fault_share .0.5.*no such way"):
        fit_and_record(tmp_path, RuleTask(lambda text: rule("skip")))


def test_overlong_prompts_are_dropped_and_counted_or_refused(tmp_path: Path) -> None:
    task = RuleTask(lambda text: "1" in text)
    with pytest.warns(UserWarning, match=r"tokens is 7: 3 of 7 prompts .*problem p2: its prompt has 8 tokens.*dropped"):
        recorder, _ = fit_and_record(tmp_path, task, epochs=4, max_prompt_tokens=7)
    assert {p.prompt for epoch in recorder.epochs for p in epoch.problems} == {"tea 1 milk 2", "tea 1 milk 2 eggs"}
    assert recorder.metrics[-1]["rollout/overlong_prompts"] > 0
    with pytest.raises(ConfigError, match=r"problem p\d: its prompt has \d+ tokens"):
        fit_and_record(tmp_path, task, max_prompt_tokens=7, overlong_prompts="error")
    with (
        pytest.warns(UserWarning, match="7 of 7 prompts"),
        pytest.raises(ConfigError, match="7 consecutive prompts were longer"),
    ):
        fit_and_record(tmp_path, task, max_prompt_tokens=3)


def test_rescoring_finds_no_mismatch_with_the_transformers_engine(tmp_path: Path) -> None:
    recorder, _ = fit_and_record(tmp_path, LastDigit(), rescore=True, prompts_per_epoch=8)
    stats = recorder.metrics[0]
    assert 0 <= stats["rollout/mismatch_mean"] <= stats["rollout/mismatch_max"] < 1e-4
    assert stats["rollout/mismatch_kl"] == pytest.approx(0, abs=1e-6)
    assert stats["rollout/mismatch_capped"] == 0
    torch.testing.assert_close(recorder.epochs[0].importance, recorder.epochs[0].mask.float(), rtol=0, atol=1e-3)


class BiasedEngine(TransformersEngine):
    """Reports each log-prob 1.5 nats too low."""

    def generate(self, *args: Any) -> Iterator[Rollout]:
        for rollout in super().generate(*args):
            rollout.logp_sampler = rollout.logp_sampler - 1.5
            yield rollout


def test_a_biased_sampler_is_corrected_and_its_mismatch_measured(tmp_path: Path) -> None:
    recorder, _ = fit_and_record(tmp_path, LastDigit(), rescore=True, prompts_per_epoch=8, engine=BiasedEngine())
    epoch = recorder.epochs[0]
    rescored = torch.tensor([r.logp_policy is not None for r in epoch.rollouts])
    assert torch.equal(rescored, epoch.advantages != 0)
    assert epoch.importance[epoch.mask & rescored[:, None]].unique().tolist() == [2.0], "e^1.5, capped"
    assert epoch.importance[epoch.mask & ~rescored[:, None]].unique().tolist() == [1.0]
    assert recorder.metrics[0]["rollout/mismatch_mean"] == pytest.approx(1.5, abs=1e-3)
    assert recorder.metrics[0]["rollout/mismatch_kl"] == pytest.approx(math.exp(1.5) - 2.5, abs=1e-2)
    assert recorder.metrics[0]["rollout/mismatch_capped"] == 1
    assert recorder.metrics[0]["time/rescore"] > 0


@pytest.mark.usefixtures("in_a_script")
def test_a_task_that_cannot_be_pickled_is_refused_before_any_rollout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RolloutDataModule, "draw", None)
    monkeypatch.setattr(RolloutDataModule, "_make_epoch", None)
    task = RuleTask(lambda text: True)
    task.isolated = True
    with pytest.raises(ConfigError, match="the task RuleTask cannot be pickled"):
        fit_and_record(tmp_path, task)


@pytest.mark.parametrize("method", [SDPO(), EntropyBonus()], ids=["SDPO", "EntropyBonus"])
def test_a_biased_sampler_is_corrected_for_rollouts_without_advantage(method: Method, tmp_path: Path) -> None:
    """Here all rollouts are correct, and these methods still train on them."""
    recorder, _ = fit_and_record(
        tmp_path, RuleTask(lambda text: True), rescore=True, engine=BiasedEngine(), method=method
    )
    epoch = recorder.epochs[0]
    assert not epoch.advantages.any()
    assert epoch.credit.trains.all()
    assert epoch.importance[epoch.mask].unique().tolist() == [2.0], "e^1.5, capped"


@dataclass(frozen=True)
class Forgetful(EntropyBonus):
    """A user's method that trains on more rollouts than `may_train` declares."""

    def may_train(self, advantages: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
        return advantages != 0


def test_a_method_that_trains_on_rollouts_not_rescored_is_refused(tmp_path: Path) -> None:
    fit_and_record(tmp_path, LastDigit(), method=Forgetful())
    with pytest.raises(ConfigError, match=r"Forgetful trains on rollouts .* override may_train"):
        fit_and_record(tmp_path, LastDigit(), method=Forgetful(), rescore=True)


def test_a_task_without_problems_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no problems to train on"):
        fit_and_record(tmp_path, RuleTask(bool, size=0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollouts_per_prompt": 1}, "rollouts_per_prompt is 1"),
        ({"prompts_per_epoch": 5}, "prompts_per_epoch"),
        ({"minibatches": 0}, "minibatches"),
        ({"sampling": Sampling(temperature=0.0)}, "temperature"),
    ],
)
def test_invalid_data_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RolloutDataModule(**settings)


def test_an_evaluation_set_without_problems_or_samples_is_refused(tmp_path: Path) -> None:
    for benchmark, message in (
        (Benchmark(samples=0), "samples is 0"),
        (Benchmark(task=RuleTask(bool, size=0)), "no problems to evaluate on"),
    ):
        data = RolloutDataModule(benchmarks={"x": benchmark})
        trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path)
        with pytest.raises(ConfigError, match=rf"data.benchmarks.x.*{message}"):
            trainer.validate(RLRTModule(Policy(), Teacher()), datamodule=data)


def test_log_probs_of_a_truncated_distribution_need_rescoring(tmp_path: Path) -> None:
    engine = VllmServerEngine(["http://127.0.0.1:9"])
    cut = {"engine": engine, "sampling": Sampling(max_new_tokens=8, top_p=0.9)}
    with pytest.raises(ConfigError, match=r"data\.sampling cuts the distribution.*data\.rescore=true"):
        fit_and_record(tmp_path, LastDigit(), **cut)


def test_the_first_rollout_above_tokens_per_pass_is_reported(tmp_path: Path) -> None:
    """Once in a run, with its length; the run continues."""
    with pytest.warns(UserWarning, match="data.tokens_per_pass") as found:
        recorder, module = fit_and_record(
            tmp_path, RuleTask(lambda text: len(text) % 2), epochs=2, rollouts_per_prompt=8, tokens_per_pass=12
        )
    (message,) = [str(w.message) for w in found if "tokens_per_pass" in str(w.message)]
    first = recorder.epochs[0]
    trained = [r for r, used in zip(first.rollouts, first.credit.trains, strict=True) if used]
    longest = max(len(r.prompt_ids) + len(r.response_ids) for r in trained)
    assert f"a rollout has {longest} tokens (prompt and response), more than data.tokens_per_pass (12)" in message
    assert module.trainer.accumulate_grad_batches == 1, "the trainer can fit again"
