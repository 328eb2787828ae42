"""What a resumed run may change, and checkpoints loaded without a trainer."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from rlrt_lightning import (
    GRPO,
    ConfigError,
    DatasetTask,
    ExactMatch,
    LoRA,
    Policy,
    ReasoningGym,
    RLRTModule,
    RolloutDataModule,
    Teacher,
    VllmServerEngine,
)
from rlrt_lightning.resume import FORMAT, KEY, check, digest, of_object, rebuilt, settings
from rlrt_lightning.runtime.optimizers import WarmUp, keep_settings, probe
from rlrt_lightning.tasks import Problem
from rlrt_lightning.tasks.last_digit import TEACHER_TEMPLATE
from tests.helpers.command_line import TRAIN_ONLY, cli_exit_code, runs_in, weights


@pytest.fixture(scope="module")
def run2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs, four optimizer steps."""
    folder = tmp_path_factory.mktemp("run")
    assert cli_exit_code("fit", folder, "--trainer.max_epochs=2") == 0
    return folder


def last_checkpoint(folder: Path, number: int = 0) -> Path:
    return runs_in(folder)[number] / "checkpoints" / "last.ckpt"


def error_line(capfd: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def test_changed_optimizer_and_trainer_settings_take_effect_and_are_named(
    run2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = {
        "model.optimizer.lr": "1e-6",
        "model.optimizer.weight_decay": "0.1",
        "model.optimizer.betas": "[0.8,0.9]",
        "model.warmup_steps": "20",
        "trainer.accumulate_grad_batches": "2",
        "trainer.max_epochs": "3",
        "data.engine.max_rows": "40",
        "checkpoint.save_top_k": "-1",
    }
    args = [f"--{name}={value}" for name, value in flags.items()]
    assert cli_exit_code("fit", tmp_path, f"--ckpt_path={last_checkpoint(run2)}", *args) == 0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "resuming" in line]
    assert f"{last_checkpoint(run2)}: RLRT, epoch 2, after 4 optimizer steps; changed since: " in line
    for name in flags:
        assert f"{name} was " in line
    saved = torch.load(last_checkpoint(tmp_path), weights_only=True)
    (group,) = saved["optimizer_states"][0]["param_groups"]
    rate = 1e-6 * 7 / 20  # for the seventh step
    assert (group["initial_lr"], group["weight_decay"], group["betas"]) == (1e-6, 0.1, (0.8, 0.9))
    assert group["lr"] == pytest.approx(rate)
    assert saved["lr_schedulers"][0]["base_lrs"] == [1e-6]
    moved = max(float((w - weights(run2)[name]).abs().max()) for name, w in weights(tmp_path).items())
    assert 0 < moved < 3e-6, "two steps of Adam at the new rate; the old rate would move weights a hundred times as far"


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--model.method=RLSD"], ["model.method"]),
        (["--model.method=SDPO"], ["model.method", "teacher_refresh.ema_decay"]),
        (["--seed_everything=1", "--model.method.lam=0.4"], ["data.seed", "model.method.lam"]),
        (
            [
                "--data.task.trap=false",
                "--data.rollouts_per_prompt=4",
                "--data.sampling.temperature=0.9",
                "--data.prompts_per_epoch=16",
                "--data.minibatches=4",
                "--model.clip_high=0.3",
                "--model.teacher.strip_think=false",
                "--model.policy.chat_kwargs={enable_thinking: false}",
                "--teacher_refresh.every_n_epochs=2",
            ],
            None,
        ),
    ],
    ids=str,
)
def test_changes_that_affect_learning_are_refused_by_name(
    flags: list[str], names: list[str] | None, run2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli_exit_code("fit", tmp_path, *flags, f"--ckpt_path={last_checkpoint(run2)}", "--trainer.max_epochs=3") == 2
    line = error_line(capfd)
    for name in names or [flag.removeprefix("--").split("=")[0] for flag in flags]:
        assert f"{name} was " in line
        assert name in line.split("--model.allow_changes=[")[1]
    assert not list(tmp_path.rglob("*.ckpt"))


def test_allow_changes_permits_named_changes_with_a_warning(
    run2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    flags = [
        "--model.method=GRPO",
        "--seed_everything=1",
        "--trainer.max_epochs=3",
        f"--ckpt_path={last_checkpoint(run2)}",
    ]
    assert cli_exit_code("fit", tmp_path, *flags, "--model.allow_changes=[model.method]") == 2
    assert "add --model.allow_changes=[model.method,data.seed]" in error_line(capfd)
    assert cli_exit_code("fit", tmp_path, *flags, "--model.allow_changes=[model.metod]") == 2
    assert "model.metod, which is not a setting of this run (did you mean model.method?)" in error_line(capfd)
    assert cli_exit_code("fit", tmp_path, *flags, "--model.allow_changes=[model.method,seed_everything]") == 0
    (warning,) = [r for r in caplog.records if r.name == "rlrt_lightning.resume" and r.levelname == "WARNING"]
    assert "data.seed was 0 and is 1; model.method was RLRT and is GRPO" in warning.getMessage()
    assert "GRPO, epoch 2" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.optimizer=SGD", "--model.allow_changes=[model]"], "which torch.optim.sgd.SGD cannot load"),
        (["--model.optimizer.amsgrad=true"], "does not contain max_exp_avg_sq, which model.optimizer needs"),
    ],
)
def test_an_optimizer_that_cannot_use_the_saved_state_is_always_refused(
    flags: list[str], message: str, run2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli_exit_code("fit", tmp_path, *flags, f"--ckpt_path={last_checkpoint(run2)}", "--trainer.max_epochs=3") == 2
    assert message in error_line(capfd)


def test_an_evaluation_only_requires_the_same_model(
    run2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = ["--model.method=GRPO", "--seed_everything=1", f"--ckpt_path={last_checkpoint(run2)}"]
    assert cli_exit_code("validate", tmp_path, *other) == 0
    capfd.readouterr()
    assert cli_exit_code("validate", tmp_path, *other, "--model.policy.lora.rank=2") == 2
    assert "model.policy.lora was None and is LoRA" in error_line(capfd)


def test_changed_data_in_the_same_file_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sums.jsonl"
    rows = [f'{{"prompt": "a{i}", "reward_model": {{"ground_truth": "{i}"}}}}\n' for i in range(8)]
    file.write_text("".join(rows))
    args = ["--data.task=DatasetTask", f"--data.task.train={file}", f"--data.task.heldout={file}"]
    args += ["--data.task.reward=ExactMatch", "--data.benchmarks.longer.task=DatasetTask"]
    args += [f"--data.benchmarks.longer.task.heldout={file}"]
    assert cli_exit_code("fit", tmp_path, *args, "--trainer.max_epochs=1") == 0
    file.write_text("".join(rows).replace('"7"', '"8"'))
    capfd.readouterr()
    assert cli_exit_code("fit", tmp_path, *args, "--trainer.max_epochs=2", "--ckpt_path=last") == 2
    assert "data.task.problems was 8 problems, digest " in error_line(capfd)


def test_a_resume_from_python_is_checked_too(run2: Path, tmp_path: Path) -> None:
    module = RLRTModule(Policy(), Teacher(template=TEACHER_TEMPLATE), GRPO(), warmup_steps=0)
    data = RolloutDataModule(prompts_per_epoch=8)
    trainer = Trainer(
        max_epochs=3,
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        accelerator="cpu",
        default_root_dir=tmp_path,
    )
    with pytest.raises(ConfigError, match=r"model\.method was RLRT and is GRPO"):
        trainer.fit(module, datamodule=data, ckpt_path=last_checkpoint(run2))


# -- recorded settings ---------------------------------------------------------------------------------------------


def test_every_constructor_parameter_is_in_the_recorded_settings(tmp_path: Path) -> None:
    """A change of a parameter that is not recorded under its name would go unnoticed."""
    data = RolloutDataModule(
        task=DatasetTask(train="a.jsonl", reward=ExactMatch()), engine=VllmServerEngine(["http://u"])
    )
    module = RLRTModule(Policy(lora=LoRA()), Teacher(), GRPO())
    found = settings(Trainer(logger=False, default_root_dir=tmp_path), module, data)
    made = {"model": module, "data": data, "data.task": data.task, "data.engine": data.engine}
    made |= {"data.task.reward": ExactMatch(), "model.policy": module.policy, "model.policy.lora": LoRA()}
    made |= {"model.teacher": module.teacher, "model.method": module.method, "data.sampling": data.sampling}
    for name, value in made.items():
        for parameter in inspect.signature(type(value)).parameters:
            if parameter != "allow_changes":
                assert f"{name}.{parameter}" in found, f"{name}.{parameter}"
    gym = of_object(ReasoningGym("chain_sum", config={"min_terms": 2}), "data.task")
    assert gym["data.task.config"] == {"min_terms": 2}
    torch.save(found, tmp_path / "plain")
    assert torch.load(tmp_path / "plain", weights_only=True) == found


def test_another_format_is_refused_and_missing_settings_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    now: dict[str, Any] = {"data.seed": 0}
    with pytest.raises(ConfigError, match=rf"has format 99 .* reads format {FORMAT}"):
        check({KEY: {"format": 99}}, "x.ckpt", now, [], fit=True)
    assert check({}, "x.ckpt", now, [], fit=True) == ([], [])
    assert "x.ckpt does not contain the settings of its run" in caplog.text


def test_equal_values_of_yaml_and_python_types_are_no_change() -> None:
    before = {KEY: {"format": FORMAT, "settings": {"model.x": [0.9, 1], "model.y": 1, "model.only_then": 3}}}
    assert check(before, "x", {"model.x": (0.9, 1.0), "model.y": 1.0, "model.only_now": 2}, [], fit=True) == ([], [])


def test_the_digest_covers_every_field_of_a_problem() -> None:
    def of(**changed: Any) -> str:
        return digest(
            [Problem(**{"id": str(i), "prompt": "p", "answer": "a", "solution": "s", **changed}) for i in range(3)]
        )

    names = {of(), of(prompt="q"), of(answer="b"), of(solution=None), of(id="0")}
    assert len(names) == 5


def test_a_recorded_class_of_another_package_is_not_instantiated() -> None:
    with pytest.raises(ConfigError, match=r"model.method is os.path.Method in the checkpoint, not a class of"):
        rebuilt({"model.method": "os.path.Method"}, "model.method")


def test_loading_an_optimizer_state_keeps_the_new_settings() -> None:
    def made(lr: float, steps: int, **more: Any) -> tuple[torch.optim.Optimizer, WarmUp]:
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.AdamW([weight], lr=lr, **more)
        schedule = WarmUp(optimizer, steps)
        keep_settings(optimizer)
        return optimizer, schedule

    before, schedule = made(0.1, 4)
    for _ in range(2):
        before.param_groups[0]["params"][0].grad = torch.ones(2)
        before.step()
        schedule.step()
    after, resumed = made(0.5, 6, weight_decay=0.3)
    after.load_state_dict(before.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    group = after.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.5 * 3 / 6, 0.3)
    assert after.state[group["params"][0]]["step"] == 2
    after.step()
    resumed.step()
    assert group["lr"] == 0.5 * 4 / 6


def test_an_optimizer_that_the_probe_cannot_build_is_not_compared() -> None:
    assert probe(lambda weights: torch.optim.AdamW([{"params": list(weights), "lr": None}])) is None
    found = probe(lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9))
    assert found is not None
    assert found[1] == ["momentum_buffer"]


# -- without a trainer ---------------------------------------------------------------------------------------------


def test_a_checkpoint_loads_without_a_trainer(run2: Path) -> None:
    for parts in ({}, {"policy": Policy(), "teacher": Teacher(), "method": GRPO()}):
        module = RLRTModule.load_from_checkpoint(last_checkpoint(run2), **parts)
        state = weights(run2)
        assert {name: float(w.sum()) for name, w in module.state_dict().items()} == {
            name: float(w.sum()) for name, w in state.items()
        }
        assert type(module.method).__name__ == ("GRPO" if parts else "RLRT")
    assert RLRTModule.load_from_checkpoint(last_checkpoint(run2)).teacher.template == TEACHER_TEMPLATE
    prompt = module.policy.tokenizer("12+34", return_tensors="pt", add_special_tokens=False)
    assert module.policy.model.generate(**prompt, max_new_tokens=3).shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.slow
def test_own_teacher_weights_and_adapters_load_without_a_trainer(tmp_path: Path) -> None:
    runs = [["--model.policy.lora.rank=4", "--teacher_refresh.every_n_epochs=2"], ["--model.method=RLSD"]]
    runs.append(["--model.reference_kl=0.1"])
    for number, (flags, kind) in enumerate(zip(runs, ("own", "initial", "policy"), strict=True)):
        assert cli_exit_code("fit", tmp_path, *flags, "--trainer.max_epochs=1") == 0
        module = RLRTModule.load_from_checkpoint(last_checkpoint(tmp_path, number))
        assert module.teacher.weights == kind
        for name, value in module.state_dict().items():
            assert torch.equal(value, weights(tmp_path, number)[name]), name


def test_a_teacher_declared_by_the_method_equals_one_set_by_flags(tmp_path: Path) -> None:
    flags = ["--model.method=RLSD", "--data.prompts_per_epoch=4", *TRAIN_ONLY]
    assert cli_exit_code("fit", tmp_path, *flags, "--trainer.max_epochs=1") == 0
    explicit = ["--teacher_refresh.every_n_epochs=null", "--ckpt_path=last"]
    assert cli_exit_code("fit", tmp_path, *flags, *explicit, "--trainer.max_epochs=2") == 0


def test_loading_a_missing_or_broken_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no checkpoint at"):
        RLRTModule.load_from_checkpoint(tmp_path / "none.ckpt")
    (tmp_path / "bad.ckpt").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"bad.ckpt is truncated or not a checkpoint"):
        RLRTModule.load_from_checkpoint(tmp_path / "bad.ckpt")
