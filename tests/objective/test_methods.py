"""Every method of the paper from the command line, and methods of users."""

from __future__ import annotations

import importlib
import json
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rlrt_lightning import SDPO, ConfigError, LastDigit, Needs, Policy
from rlrt_lightning.policy.padding import pad_sequences
from tests.helpers.command_line import TRAIN_ONLY, cli_exit_code, runs_in, scalars, weights, without_timings
from tests.helpers.epochs import fit_and_record
from tests.helpers.marks import slow_except
from tests.helpers.processes import ROOT
from tests.helpers.tiny import tiny_policy

SETTINGS = {
    "grpo": "GRPO(normalize_std=False)",
    "grpo_std": "GRPO(normalize_std=True)",
    "grpo_entropy": "EntropyBonus(normalize_std=False, coef=0.001)",
    "rlrt": "RLRT(lam=0.5, eps_w=1.0, gated=True",
    "rlrt_all": "RLRT(lam=0.5, eps_w=1.0, gated=False",
    "rlrt_contrast": "RLRT(lam=0.5, eps_w=1.0, gated=True, success_threshold=0.5, context='sibling', "
    "normalize_std=True, contrast=True",
    "antisd": "AntiSD(lam=0.5, warmup_steps=5, close_at=0.93, success_threshold=0.5, context='sibling_or_solution'",
    "antisd_no_gate": "AntiSD(lam=0.5, warmup_steps=0,",
    "rlcsd": "RLCSD(beta=0.2, lam=0.5, tau=0.03, delta=0.02, residual_low=-0.5, residual_high=0.5, eta=1.0",
    "rlsd": "RLSD(lam=0.5, eps_w=0.2, gated=False, success_threshold=0.5, context='answer'",
    "teacher_predicted": "RLSD(lam=0.5, eps_w=1.0, gated=True, success_threshold=0.5, context='sibling'",
    "sdpo": "SDPO(alpha=0.5, top_k=100, importance_cap=2.0, context='sibling'",
    "srpo": "SRPO(beta=1.0, alpha=0.5, top_k=100, importance_cap=2.0, context='sibling'",
    "diver": "DIVER(normalize_std=False, scale=0.1, cap=1.0, diversity='bleu', tokenize='13a', steps=100",
}

TEACHERS = {
    "rlrt": "the weights of the policy that generates the rollouts",
    "rlrt_all": "the weights of the policy that generates the rollouts",
    "rlrt_contrast": "the weights of the policy that generates the rollouts",
    "antisd": "the weights of the policy that generates the rollouts",
    "antisd_no_gate": "the weights of the policy that generates the rollouts",
    "rlcsd": "a copy of the policy's weights, refreshed every 10 epochs",
    "rlsd": "the initial weights",
    "teacher_predicted": "the weights of the policy that generates the rollouts",
    "sdpo": "a moving average of the policy's weights (decay 0.95), updated every epoch",
    "srpo": "the weights of the policy that generates the rollouts",
}
"""The teachers of the methods that have one."""


def test_each_method_has_a_config() -> None:
    assert set(SETTINGS) == {path.stem for path in (ROOT / "configs" / "methods").glob("*.yaml")}


@pytest.mark.parametrize("name", slow_except(SETTINGS, "rlrt", "srpo", "rlcsd"))
def test_each_method_trains_from_the_command_line(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    flags = ("--trainer.max_epochs=2", *TRAIN_ONLY, "--trainer.enable_checkpointing=false")
    assert cli_exit_code("fit", tmp_path, *flags, configs=(f"configs/methods/{name}.yaml",)) == 0
    (line,) = [message for message in caplog.messages if message.startswith("method: ")]
    assert SETTINGS[name] in line, "the log shows the effective settings"
    assert line.endswith(f"; the teacher has {TEACHERS[name]}" if name in TEACHERS else ")")
    curves = scalars(tmp_path)
    for tag in ("train/loss", "train/grad_norm"):
        values = torch.tensor([value for _, value in curves[tag]])
        assert torch.isfinite(values).all()
        assert values.abs().max() > 0
    assert ("train/divergence" in curves) == (name in ("sdpo", "srpo"))
    assert ("signal/context" in curves) == (name not in ("grpo", "grpo_std", "grpo_entropy", "diver"))
    assert ("signal/gate_open" in curves) == (name == "antisd")
    assert ("signal/selected" in curves) == (name == "rlcsd")
    assert ("signal/contrasted" in curves) == (name in ("rlcsd", "rlrt_contrast"))
    shaped = [v for _, v in curves["rollout/shaped_reward"]] != [v for _, v in curves["rollout/reward"]]
    assert shaped == (name == "diver")


def test_the_docs_example_method_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n# my_method\.py\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert len(code.splitlines()) < 30
    (tmp_path / "my_method.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    try:
        assert cli_exit_code("fit", tmp_path, "--trainer.max_epochs=1", "--model.method=my_method.FirstTokens") == 0
    finally:
        sys.modules.pop("my_method", None)
    assert "FirstTokens(" in caplog.text


NEW_METHOD = """
from dataclasses import dataclass, replace

import torch
from rlrt_lightning import Credit, DivergenceSettings, Method, Needs, Signals, TeacherWeights


@dataclass(frozen=True)
class Unsure(Method):
    \"""GRPO, plus distillation where a teacher, refreshed every two epochs, is less sure than on average.

    Args:
        strength: Weight of the distillation.
    \"""

    strength: float = 0.1
    normalize_std: bool = True
    context = "sibling"
    needs = Needs(entropy=True, top_k=5, teacher=TeacherWeights(every_n_epochs=2))

    def credit(self, signals: Signals) -> Credit:
        scored = signals.mask & signals.has_context[:, None]
        entropy = torch.where(scored, signals.teacher_entropy, 0.0)
        total, tokens = signals.sum_over_ranks(torch.stack([entropy.sum(), scored.sum()]))
        pulled = self.strength * (scored & (entropy > total / tokens))
        return replace(Credit.plain(signals), distillation=pulled, divergence=DivergenceSettings(1.0, 3.0))

    def uses_teacher(self, advantages, rewards):
        return advantages != 0
"""
NEW_CONFIG = "model: {method: {class_path: new_method.Unsure, init_args: {strength: 0.5}}}"


@pytest.fixture
def new_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the file of a method and its config."""
    (tmp_path / "new_method.py").write_text(NEW_METHOD)
    (tmp_path / "new_method.yaml").write_text(NEW_CONFIG)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("new_method", None)


def test_a_new_method_needs_only_one_file_and_a_config(new_method: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It needs entropies, a divergence and a teacher with its own weights."""
    caplog.set_level(logging.INFO)
    for strength in ("0.5", "0.25"):
        caplog.clear()
        flags = ["--trainer.max_epochs=2", *TRAIN_ONLY]
        if strength != "0.5":
            flags += [f"--model.method.strength={strength}"]
        assert cli_exit_code("fit", new_method, *flags, configs=(str(new_method / "new_method.yaml"),)) == 0
        assert f"method: Unsure(strength={strength}, normalize_std=True); the teacher has a copy" in caplog.text
    one, half = (scalars(new_method, version) for version in range(2))
    for curves in (one, half):
        assert all(value > 0 for _, value in curves["train/divergence"])
    for tag in ("train/divergence", "train/grad_norm"):
        assert one[tag][-1] != half[tag][-1], "the strength has an effect"
    teacher, policy_ = (model_weights(weights(new_method), owner) for owner in ("teacher", "policy"))
    assert all(torch.equal(teacher[name], policy_[name]) for name in policy_), "refreshed after two epochs"


# -- the weights of the teacher ------------------------------------------------------------------------------------


def model_weights(state: dict[str, torch.Tensor], owner: str) -> dict[str, torch.Tensor]:
    """The weights of the policy or the teacher in a module's state dict."""
    prefix = f"{owner}.model."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def initial_weights() -> dict[str, torch.Tensor]:
    made = Policy()
    made.load()
    return made.model.state_dict()


def average_of_policies(folder: Path, decay: float) -> dict[str, torch.Tensor]:
    """The moving average of the policies that a run has saved after each epoch."""
    average = initial_weights()
    for epoch in range(3):
        path = runs_in(folder)[0] / "checkpoints" / f"epoch-{epoch}.ckpt"
        policy_ = model_weights(torch.load(path, weights_only=True)["state_dict"], "policy")
        average = {name: decay * average[name] + (1 - decay) * policy_[name] for name in average}
    return average


@pytest.mark.parametrize(
    ("flags", "decay"),
    [
        pytest.param(["--model.method=SDPO"], 0.95, marks=pytest.mark.slow),
        (["--model.method=SDPO", "--teacher_refresh.ema_decay=0.5"], 0.5),
        pytest.param(["--model.method=SDPO", "--teacher_refresh.every_n_epochs=1"], None, marks=pytest.mark.slow),
        pytest.param(["--model.method=SDPO", "--teacher_refresh.ema_decay=0"], None, marks=pytest.mark.slow),
        pytest.param(["--model.method=RLSD"], 1.0, marks=pytest.mark.slow),
        pytest.param(["--model.method=RLSD", "--model.method.gated=true"], None, marks=pytest.mark.slow),
        pytest.param(["--model.method=RLSD", "--teacher_refresh.ema_decay=0.9"], 0.9, marks=pytest.mark.slow),
        pytest.param(["--model.method=RLRT"], None, marks=pytest.mark.slow),
        pytest.param(["--model.method=RLRT", "--teacher_refresh.every_n_epochs=null"], 1.0, marks=pytest.mark.slow),
        pytest.param(["--model.method=RLSD", "--model.method=GRPO"], None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_method_chosen_by_flag_uses_its_own_teacher(flags: list[str], decay: float | None, tmp_path: Path) -> None:
    """Unless teacher_refresh is set. A decay of 1: never refreshed; None: no copy."""
    keep = ["--checkpoint.save_top_k=-1", "--trainer.max_epochs=3", *TRAIN_ONLY]
    assert cli_exit_code("fit", tmp_path, *keep, *flags) == 0
    teacher = model_weights(weights(tmp_path), "teacher")
    if decay is None:
        assert not teacher
        return
    for name, value in average_of_policies(tmp_path, decay).items():
        torch.testing.assert_close(teacher[name], value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", slow_except(["SDPO", "RLSD"], "SDPO"))
def test_a_resumed_run_keeps_the_methods_teacher(method: str, tmp_path: Path) -> None:
    flags = [f"--model.method={method}", *TRAIN_ONLY]
    assert cli_exit_code("fit", tmp_path / "whole", *flags, "--trainer.max_epochs=3") == 0
    assert cli_exit_code("fit", tmp_path, *flags, "--trainer.max_epochs=1") == 0
    assert cli_exit_code("fit", tmp_path, *flags, "--trainer.max_epochs=3", "--ckpt_path=last") == 0
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    teacher, policy_ = model_weights(resumed, "teacher"), model_weights(resumed, "policy")
    assert any(not torch.equal(teacher[name], policy_[name]) for name in policy_)


@pytest.mark.slow  # tests/test_resume.py has the opposite change
def test_resuming_with_another_methods_teacher_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_exit_code("fit", tmp_path, "--model.method=SDPO", "--trainer.max_epochs=1", *TRAIN_ONLY) == 0
    assert cli_exit_code("fit", tmp_path, "--model.method=RLRT", "--trainer.max_epochs=2", "--ckpt_path=last") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "model.method was SDPO and is RLRT; teacher_refresh.ema_decay was 0.95 and is 0.0; restore them" in line


def test_an_engine_cannot_score_for_a_teacher_with_its_own_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ["--data.engine=VllmServerEngine", "--data.engine.urls=[http://127.0.0.1:9]"]
    asked = ["--model.method=RLSD", "--model.teacher.scored_by=engine"]
    assert cli_exit_code("fit", tmp_path, *server, *asked) == 2
    assert "but the teacher has the initial weights; set teacher_refresh.every_n_epochs=1" in capsys.readouterr().err


def test_top_k_above_the_vocabulary_size_equals_the_full_divergence(tmp_path: Path) -> None:
    """With 57 tokens, comparing all of them or at most 100 is the same."""
    for top_k in ("null", "100"):
        flags = ["--model.method=SDPO", f"--model.method.top_k={top_k}", "--trainer.max_epochs=1", *TRAIN_ONLY]
        assert cli_exit_code("fit", tmp_path, *flags) == 0
    one, other = (without_timings(scalars(tmp_path, version)) for version in range(2))
    assert one == other


@dataclass(frozen=True)
class SDPOWithoutTokens(SDPO):
    """Requests no tokens to compare."""

    needs = Needs()


def test_a_divergence_without_tokens_to_compare_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="requests no tokens to compare; set top_k in its needs"):
        fit_and_record(tmp_path, LastDigit(), method=SDPOWithoutTokens(), prompts_per_epoch=8)


# -- other checks --------------------------------------------------------------------------------------------------


def test_a_context_that_no_problem_has_is_refused_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"a{i}b2", "answer": "3"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = [f"--data.task.{split}={tmp_path / 'rows.jsonl'}" for split in ("train", "heldout")]
    flags = ("--data.task=DatasetTask", *data, "--data.task.answer=answer", "--model.method.context=solution")
    assert cli_exit_code("fit", tmp_path, *flags) == 2
    assert "model.method.context is solution, but none of the first 8" in capsys.readouterr().err


def test_from_logits_never_holds_the_whole_batch() -> None:
    made = tiny_policy()
    made.logits_chunk = 4
    sequences = [([2, 3], [4, 5, 6, 7, 8]), ([2], [9, 10, 11, 12])]
    seen: list[int] = []

    def compute(logits: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(len(logits))
        return (logits.logsumexp(-1),)

    (totals,) = made.from_logits(compute, *pad_sequences(sequences), 1.0)
    totals.sum().backward()
    assert len(totals) == 9
    assert max(seen) == 4
    assert sum(seen) == 2 * 9, "once forward, once more for the gradient"
