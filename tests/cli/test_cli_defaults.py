"""Settings of the command line: each class has its own defaults, and errors are one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from rlrt_lightning.__main__ import main
from rlrt_lightning.cli.commands import RLRTCli
from rlrt_lightning.cli.refusals import run
from rlrt_lightning.runtime.errors import ConfigError
from tests.helpers.command_line import ParsingCli

Parse = Callable[..., Namespace]

RLRT_09 = "model: {method: {class_path: RLRT, init_args: {lam: 0.3, eps_w: 0.9}}}"
ADAMW = "model: {optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.1, weight_decay: 0.5}}}"
SUMS = "data: {task: {class_path: LastDigit, init_args: {heldout: 7, seed: 9}}}"
MATH = "data: {task: {class_path: DatasetTask, init_args: {train: a.jsonl, heldout: b.jsonl, reward: MathReward}}}"
STOPPING = "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: m, mode: max, verbose: true}}]}"
BENCHMARK = "data: {benchmarks: {b: {samples: 4, task: {class_path: LastDigit, init_args: {heldout: 7, seed: 9}}}}}"


@pytest.fixture(scope="module")
def cli() -> RLRTCli:
    return ParsingCli(["fit"])


@pytest.fixture
def parse(cli: RLRTCli, tmp_path: Path) -> Parse:
    """Parses flags and configs, which are given as text, in order."""

    def parse_(*args: str) -> Namespace:
        flags = []
        for number, word in enumerate(args):
            if not word.startswith("--"):
                (tmp_path / f"{number}.yaml").write_text(word)
                word = f"--config={tmp_path / f'{number}.yaml'}"
            flags.append(word)
        return cli.parser.parse_args(["fit", *flags]).fit

    return parse_


def name_of(spec: Namespace) -> str:
    return str(spec.class_path).rsplit(".", 1)[1]


def settings_of(spec: Namespace, **expected: Any) -> dict[str, Any]:
    return {name: spec.init_args[name] for name in expected}


@pytest.mark.parametrize(
    "args",
    [
        ["--model.method=RLSD"],
        ["--model.method.eps_w=0.9", "--model.method=RLSD"],
        [RLRT_09, "--model.method=RLSD"],
        [RLRT_09, "--model.method=rlrt_lightning.objective.methods.RLSD"],
        [RLRT_09, "model: {method: RLSD}"],
        [RLRT_09, "model: {method: {class_path: RLSD}}"],
        [RLRT_09, "--model.method=GRPO", "--model.method=RLSD"],
        [RLRT_09, "model: {method: GRPO}", "model: {method: RLSD}"],
    ],
    ids=" ".join,
)
def test_another_method_has_its_own_defaults(parse: Parse, args: list[str]) -> None:
    method = parse(*args).model.method
    expected = {"lam": 0.5, "eps_w": 0.2, "gated": False, "context": "answer"}
    assert (name_of(method), settings_of(method, **expected)) == ("RLSD", expected)


@pytest.mark.parametrize(
    ("args", "lam", "eps_w"),
    [
        ([RLRT_09, "--model.method=RLSD", "--model.method.eps_w=0.4"], 0.5, 0.4),
        ([RLRT_09, "model: {method: {class_path: RLSD, init_args: {lam: 0.2}}}"], 0.2, 0.2),
        ([RLRT_09, "model: {method: RLSD}", "model: {method: {init_args: {lam: 0.2}}}"], 0.2, 0.2),
        (["--model.method=RLSD", RLRT_09], 0.3, 0.9),
        ([RLRT_09, "--model.method=RLSD", "--model.method=RLRT"], 0.5, 1.0),
    ],
)
def test_settings_given_with_or_after_the_class_apply(parse: Parse, args: list[str], lam: float, eps_w: float) -> None:
    method = parse(*args).model.method
    assert settings_of(method, lam=0, eps_w=0) == {"lam": lam, "eps_w": eps_w}


@pytest.mark.parametrize(
    "again",
    [
        "--model.method=RLRT",
        "--model.method=rlrt_lightning.RLRT",
        "--model.method=rlrt_lightning.objective.methods.RLRT",
        "model: {method: RLRT}",
        "model: {method: {class_path: RLRT, init_args: {lam: 0.3}}}",
        "model: {method: {init_args: {lam: 0.3}}}",
    ],
)
def test_naming_the_same_class_again_keeps_its_settings(parse: Parse, again: str) -> None:
    method = parse(RLRT_09, again).model.method
    assert settings_of(method, lam=0, eps_w=0) == {"lam": 0.3, "eps_w": 0.9}


def test_another_optimizer_task_or_logger_has_its_own_defaults(parse: Parse) -> None:
    sgd = parse(ADAMW, "--model.optimizer=SGD").model.optimizer
    assert settings_of(sgd, lr=0, weight_decay=0) == {"lr": 0.001, "weight_decay": 0.0}
    adam = parse(ADAMW, "model: {optimizer: torch.optim.Adam}").model.optimizer
    assert settings_of(adam, lr=0, weight_decay=0) == {"lr": 0.001, "weight_decay": 0.0}

    for puzzles in (
        parse(SUMS, "--data.task=ReasoningGym", "--data.task.name=chain_sum").data.task,
        parse(SUMS, "data: {task: {class_path: ReasoningGym, init_args: {name: chain_sum}}}").data.task,
    ):
        assert settings_of(puzzles, heldout=0, seed=0) == {"heldout": 200, "seed": 0}

    logger = parse("--trainer.logger.name=mine", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=x").trainer
    assert settings_of(logger.logger, name=0) == {"name": "lightning_logs"}


@pytest.mark.parametrize(
    "later",
    ["--data.task.reward=ExactMatch", "data: {task: {init_args: {reward: ExactMatch}}}"],
    ids=["flag", "config"],
)
def test_another_nested_class_has_its_own_defaults_and_its_owner_keeps_its_settings(parse: Parse, later: str) -> None:
    task = parse(MATH, later).data.task
    assert task.init_args.train == "a.jsonl", "the task is the same, so its settings stay"
    assert name_of(task.init_args.reward) == "ExactMatch"
    assert "fallback" not in task.init_args.reward.init_args


def test_another_class_in_a_list_or_dict_has_its_own_defaults(parse: Parse) -> None:
    (saver,) = parse(STOPPING, "trainer: {callbacks: [{class_path: ModelCheckpoint}]}").trainer.callbacks
    assert settings_of(saver, monitor=0, mode=0, verbose=0) == {"monitor": None, "mode": "min", "verbose": False}
    callbacks = parse(STOPPING, "--trainer.callbacks+=HFExport", "--trainer.callbacks.path=there").trainer.callbacks
    assert [name_of(c) for c in callbacks] == ["EarlyStopping", "HFExport"]
    assert callbacks[0].init_args.mode == "max"

    puzzles = "data: {benchmarks: {b: {task: {class_path: ReasoningGym, init_args: {name: chain_sum}}}}}"
    benchmark = parse(BENCHMARK, puzzles).data.benchmarks["b"]
    assert benchmark.samples == 4
    assert settings_of(benchmark.task, heldout=0, seed=0) == {"heldout": 200, "seed": 0}
    benchmark = parse(BENCHMARK, "--data.benchmarks.b.task.heldout=8").data.benchmarks["b"]
    assert settings_of(benchmark.task, heldout=0, seed=0) == {"heldout": 8, "seed": 9}


def test_settings_of_default_classes_need_no_class_name(parse: Parse) -> None:
    flags = ["--data.task.trap=false", "--data.engine.max_rows=8", "--data.benchmarks.heldout.samples=3"]
    data = parse(*flags, "--model.policy.path=here", "--model.teacher.max_context_tokens=9").data
    assert (name_of(data.task), data.task.init_args.trap) == ("LastDigit", False)
    assert (name_of(data.engine), data.engine.init_args.max_rows) == ("TransformersEngine", 8)
    assert data.benchmarks["heldout"].samples == 3


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--model.method=RLTR", "model.method: there is no class RLTR (did you mean RLRT?)"),
        ("--data.task=ReasonngGym", "data.task: there is no class ReasonngGym (did you mean ReasoningGym?)"),
        ("--trainer.callbacks+=HFExprt", "trainer.callbacks: there is no class HFExprt (did you mean HFExport?)"),
        ("--model.method=foo.Bar", "model.method: there is no class foo.Bar: No module named 'foo'"),
        ("--model.metod=RLRT", "there is no setting --model.metod (did you mean --model.method?)"),
        ("model: {metod: RLRT}", "there is no setting model.metod (did you mean model.method?)"),
        ("--trainer.max_epoch=3", "there is no setting --trainer.max_epoch (did you mean --trainer.max_epochs?)"),
        ("--model.method.epsw=1", "model.method.epsw: RLRT has no setting epsw (did you mean eps_w?)"),
        (
            "model: {method: {class_path: GRPO, init_args: {eps_w: 1}}}",
            "model.method.eps_w: GRPO has no setting eps_w; RLRT and RLSD have it",
        ),
        ("--data.task.digts=[1, 2]", "data.task.digts: LastDigit has no setting digts (did you mean digits?)"),
        ("--data.benchmarks.a.tsk=x", "data.benchmarks.a.tsk: Benchmark has no setting tsk (did you mean task?)"),
        ("--data.task=ReasoningGym", "data.task.name: ReasoningGym needs a value for name"),
        ("--model.method.eps_w=abc", "model.method.eps_w: it has to be float; it is abc"),
        ("--trainer.max_epochs=x", "trainer.max_epochs: it has to be int or null; it is x"),
        (
            "--model.policy.dtype=float64",
            "model.policy.dtype: it has to be one of float32, bfloat16, float16; it is float64",
        ),
    ],
)
def test_wrong_settings_give_the_expected_line(parse: Parse, word: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(word)
    assert str(error.value) == message


def test_a_setting_of_the_replaced_class_is_refused(parse: Parse) -> None:
    with pytest.raises(ConfigError, match="GRPO has no setting eps_w; RLRT and RLSD have it"):
        parse(RLRT_09, "--model.method=GRPO", "--model.method.eps_w=0.2")


# The slow ones are like others in test_wrong_values.py.
@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param(
            ["fitt"], "there is no command fitt; choose from fit, validate, test, predict", marks=pytest.mark.slow
        ),
        pytest.param(["fit", "--config=nothing.yaml"], "nothing.yaml", marks=pytest.mark.slow),
        (["fit", "--model.method=RLTR"], "did you mean RLRT?"),
        (["validate", "--trainer.accelerator=tpu"], "torch_xla"),
    ],
)
def test_wrong_input_ends_with_exit_code_2(
    args: list[str], message: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = [f"--trainer.default_root_dir={tmp_path}"] if args != ["fitt"] else []
    assert main([*args, *folder]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]


def test_ctrl_c_exits_with_130_and_unexpected_errors_keep_their_traceback() -> None:
    def stopped_by_lightning() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904 - as Lightning does

    def stopped_early() -> None:
        raise KeyboardInterrupt

    def broken() -> None:
        raise ZeroDivisionError

    assert run(stopped_by_lightning) == 130
    assert run(stopped_early) == 130
    with pytest.raises(ZeroDivisionError):
        run(broken)


@pytest.mark.parametrize(("seed", "streams"), [("7", 7), ("false", 0), ("true", 5)])
def test_seed_everything_sets_the_seed_of_the_data(
    parse: Parse, monkeypatch: pytest.MonkeyPatch, seed: str, streams: int
) -> None:
    monkeypatch.setitem(os.environ, "PL_GLOBAL_SEED", "5")  # Lightning's seed if the setting is true
    assert parse(f"--seed_everything={seed}").data.seed == streams


def test_all_commands_take_the_same_settings() -> None:
    for command in ("validate", "test", "predict"):
        config = ParsingCli([command, "--model.method=RLSD", "--ckpt_path=last"]).config[command]
        assert settings_of(config.model.method, eps_w=0) == {"eps_w": 0.2}
        assert config.ckpt_path == "last"
