"""End-to-end runs from the command line: training, resuming, evaluating, and the files that they write."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from rlrt_lightning.analysis.events import event_log
from rlrt_lightning.runtime.seeding import derive_seed
from tests.helpers.command_line import (
    TRAIN_ONLY,
    assert_continued,
    cli_exit_code,
    evaluation_scalars,
    runs_in,
    scalars,
    weights,
    without_timings,
)
from tests.helpers.marks import slow_except


@pytest.fixture(scope="module")
def run4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four epochs without interruption."""
    folder = tmp_path_factory.mktemp("run")
    assert cli_exit_code("fit", folder, "--trainer.max_epochs=4", "--trainer.callbacks+=HFExport") == 0
    return folder


@pytest.mark.smoke
def test_a_run_logs_all_expected_metrics_without_nan(run4: Path) -> None:
    curves = scalars(run4)
    expected = """rollout/reward rollout/correct rollout/length rollout/truncated rollout/faults rollout/entropy
        rollout/overlong_prompts groups/mixed groups/all_correct groups/all_wrong labels/guess
        train/loss train/clip_fraction train/entropy train/kl train/grad_norm train/lr
        train/empty_steps faults/rollouts faults/skipped_steps
        time/sync time/rollout time/verify time/teacher time/train
        speed/rollout_tokens_per_s speed/train_tokens_per_s speed/train_padding
        speed/score_tokens_per_s speed/score_padding
        signal/context signal/asymmetry_correct signal/asymmetry_correct_p05 signal/up_weighted signal/down_weighted
        signal/clipped signal/weight_mean signal/effective_advantage signal/context_truncated
        eval/heldout/avg@8 eval/heldout/pass@8 eval/heldout/length eval/longer/avg@8""".split()
    assert set(expected) <= set(curves)
    assert [step for step, _ in curves["eval/heldout/avg@8"]] == [0, 3, 7], "before training, and every two epochs"
    assert len(curves["rollout/reward"]) == 4
    for tag, curve in curves.items():
        assert all(value == value for _, value in curve), f"{tag} is NaN"
    shares = [dict(curves[f"groups/{kind}"]) for kind in ("mixed", "all_correct", "all_wrong")]
    assert all(abs(sum(s[step] for s in shares) - 1) < 1e-6 for step in shares[0])


def test_a_run_writes_pictures_samples_and_its_config(run4: Path) -> None:
    folder = run4 / "last-digit" / "rlrt-0"
    page = (folder / "signal" / "epoch-1.html").read_text(encoding="utf-8")
    assert "background:rgb(" in page
    assert "http" not in page, "the page loads nothing from elsewhere"
    log = event_log(folder, "images", "tensors")
    assert "signal/rollouts" in log.Tags()["images"]
    assert "signal/asymmetry" in log.Tags()["histograms"]
    assert any(tag.startswith("samples/heldout") for tag in log.Tags()["tensors"])
    assert "lam: 0.5" in (folder / "config.yaml").read_text()
    (score,) = [value for step, value in scalars(run4)["eval/longer/avg@8"] if step == 7]
    assert f"| longer | avg@8 | {score:.3f} |" in (folder / "export" / "README.md").read_text()


def test_the_export_holds_the_trained_weights_and_loads_in_transformers(run4: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run4 / "last-digit" / "rlrt-0" / "export"
    model, trained = AutoModelForCausalLM.from_pretrained(folder), weights(run4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[f"policy.model.{name}"]), name
    assert AutoTokenizer.from_pretrained(folder)("a4")["input_ids"]


def test_a_resumed_run_matches_an_uninterrupted_run(run4: Path, tmp_path: Path) -> None:
    """With a teacher that shares the policy's weights; in tests/runtime/test_stopping.py it has its own."""
    assert cli_exit_code("fit", tmp_path, "--trainer.max_epochs=2") == 0
    assert cli_exit_code("fit", tmp_path, "--trainer.max_epochs=4", "--ckpt_path=last") == 0
    assert_continued(tmp_path, run4)
    assert len(scalars(tmp_path)["train/loss"]) == 4


def test_the_same_seed_gives_the_same_run_and_another_seed_differs(run4: Path, tmp_path: Path) -> None:
    assert cli_exit_code("fit", tmp_path, "--trainer.max_epochs=1") == 0
    assert cli_exit_code("fit", tmp_path, "--trainer.max_epochs=1", "--seed_everything=1") == 0
    first = {tag: curve[0] for tag, curve in without_timings(scalars(run4)).items()}
    same = {tag: curve[0] for tag, curve in without_timings(scalars(tmp_path)).items()}
    other = {tag: curve[0] for tag, curve in without_timings(scalars(tmp_path, 1)).items()}
    assert same == {tag: first[tag] for tag in same}
    assert other["rollout/entropy"] != first["rollout/entropy"]


def test_rlrt_with_lam_zero_equals_grpo_with_std(tmp_path: Path) -> None:
    flags = ("--trainer.max_epochs=2", *TRAIN_ONLY)
    assert cli_exit_code("fit", tmp_path, "--model.method.lam=0", *flags) == 0
    assert cli_exit_code("fit", tmp_path, "--model.method=GRPO", "--model.method.normalize_std=true", *flags) == 0
    for name, value in weights(tmp_path).items():
        assert torch.equal(value, weights(tmp_path, 1)[name]), name


@pytest.mark.parametrize("every", slow_except(["1", "2", "null"], "2"))
def test_the_teachers_weights_follow_the_refresh_schedule(every: str, tmp_path: Path) -> None:
    flags = ["--trainer.max_epochs=3", f"--teacher_refresh.every_n_epochs={every}", *TRAIN_ONLY]
    assert cli_exit_code("fit", tmp_path, *flags) == 0
    state = weights(tmp_path)
    teacher = {k.removeprefix("teacher.model."): v for k, v in state.items() if k.startswith("teacher.")}
    if every == "1":
        assert not teacher, "no copy"
        return
    policy = {k.removeprefix("policy.model."): v for k, v in state.items() if k.startswith("policy.")}
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(teacher[name], policy[name])
    from rlrt_lightning import Policy

    start = Policy()
    start.load()
    frozen = torch.equal(teacher[name], start.model.state_dict()[name])
    assert frozen == (every == "null")


@pytest.mark.parametrize("name", slow_except(["validate", "test", "predict"], "validate"))
def test_validate_test_and_predict_reproduce_the_score_of_the_run(name: str, run4: Path, tmp_path: Path) -> None:
    shutil.copytree(run4 / "last-digit" / "rlrt-0", tmp_path / "last-digit" / "rlrt-0")
    assert cli_exit_code(name, tmp_path, "--ckpt_path=last") == 0
    trained = dict(scalars(run4)["eval/heldout/avg@8"])[7]
    if name != "predict":
        assert evaluation_scalars(tmp_path)["eval/heldout/avg@8"] == [(7, trained)], "at the step of the same weights"
    (results,) = runs_in(tmp_path)[0].glob("evaluation/step-8/heldout.jsonl")
    lines = results.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 6 * 8
    assert {"problem", "completion", "reward", "correct", "label", "expected"} <= set(rows[0])
    assert sum(row["correct"] for row in rows) / len(rows) == pytest.approx(trained)


def test_training_raises_the_reward(tmp_path: Path) -> None:
    flags = ["--trainer.max_epochs=10", "--data.prompts_per_epoch=16", "--model.optimizer.lr=1e-3", *TRAIN_ONLY]
    flags += ["--trainer.enable_checkpointing=false", "--reversed_signal.picture_every_n_epochs=0"]
    assert cli_exit_code("fit", tmp_path, *flags) == 0
    reward = [value for _, value in scalars(tmp_path)["rollout/reward"]]
    assert sum(reward[-3:]) / 3 > sum(reward[:3]) / 3 + 0.2


# The slow ones are like others in tests/cli/.
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(["--model.method=RLTR"], r"model.method.*RLTR.*did you mean RLRT", marks=pytest.mark.slow),
        pytest.param(["--model.metod=RLRT"], r"--model.metod.*did you mean --model.method", marks=pytest.mark.slow),
        pytest.param(["--model.method=GRPO", "--model.method.eps_w=0.2"], r"eps_w", marks=pytest.mark.slow),
        pytest.param(["--model.method.lam=2"], r"RLRT.lam is 2.0", marks=pytest.mark.slow),
        (["--model.policy.path=/nowhere"], r"model.policy.path.*/nowhere"),
        (["--data.rollouts_per_prompt=1"], r"data.rollouts_per_prompt is 1.*at least 2"),
        pytest.param(
            ["--data.minibatches=3"],
            r"data.prompts_per_epoch .8. has to be a multiple of data.minibatches .3.",
            marks=pytest.mark.slow,
        ),
        pytest.param(["--data.max_prompt_tokens=3"], r"data.max_prompt_tokens is 3", marks=pytest.mark.slow),
        (["--data.max_prompt_tokens=3", "--data.overlong_prompts=error"], r"problem .*prompt has \d+ tokens"),
        (["--data.task=DatasetTask", "--data.task.train=none.parquet"], r"none.parquet"),
        pytest.param(["--trainer.accelerator=gpu"], r"gpu", marks=pytest.mark.slow),
        pytest.param(["--trainer.strategy=fdsp"], r"fdsp", marks=pytest.mark.slow),
        pytest.param(
            ["--trainer.reload_dataloaders_every_n_epochs=0"],
            r"reload_dataloaders_every_n_epochs",
            marks=pytest.mark.slow,
        ),
        (["--ckpt_path=last"], r"no checkpoint in"),
        pytest.param(["--ckpt_path=nothing.ckpt"], r"nothing.ckpt", marks=pytest.mark.slow),
        (["--evaluation.ks=[16]"], r"evaluation.ks names 16.*samples is 8"),
        pytest.param(["--config=nothing.yaml"], r"nothing.yaml", marks=pytest.mark.slow),
    ],
)
def test_user_errors_end_with_one_line_and_exit_code_2(
    flags: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli_exit_code("fit", tmp_path, *flags) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert re.search(message, line), line


def test_seeds_of_named_streams_differ() -> None:
    seeds = {derive_seed(0, "a"), derive_seed(0, "b"), derive_seed(1, "a"), derive_seed("0a"), derive_seed("0", "a")}
    assert len(seeds) == 4, "a number and its digits give the same seed, all else another"


def test_adapters_train_and_the_export_merges_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    flags = ("--model.policy.lora.rank=4", "--trainer.max_epochs=1", "--trainer.callbacks+=HFExport", *TRAIN_ONLY)
    assert cli_exit_code("fit", tmp_path, *flags) == 0
    state = weights(tmp_path)
    moved = [value for name, value in state.items() if "lora_B" in name]
    assert any(value.any() for value in moved)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "last-digit" / "rlrt-0" / "export").state_dict()
    name = "model.layers.0.self_attn.q_proj"
    base = state[f"policy.model.{name}.base_layer.weight"]
    delta = state[f"policy.model.{name}.lora_B.default.weight"] @ state[f"policy.model.{name}.lora_A.default.weight"]
    torch.testing.assert_close(exported[f"{name}.weight"], base + 32 / 4 * delta, rtol=0, atol=1e-6)
    assert cli_exit_code("fit", tmp_path, *flags[:1], "--trainer.max_epochs=2", "--ckpt_path=last") == 0
