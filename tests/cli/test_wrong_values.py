"""Invalid values of every setting: one line that names it, and exit code 2, before any rollout."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from jsonargparse import Namespace
from lightning import Callback, LightningModule, Trainer
from torch import nn

import rlrt_lightning
from rlrt_lightning.__main__ import main
from rlrt_lightning.cli.commands import RLRTCli
from rlrt_lightning.cli.given import given
from rlrt_lightning.cli.refusals import run
from rlrt_lightning.datamodule import RolloutDataModule
from rlrt_lightning.runtime.private.jsonargparse import actions, value_type
from tests.helpers.marks import slow_except
from tests.helpers.processes import ROOT

NUMBERS = {int: ("-1", "0"), float: ("-1", ".nan")}

VALID = {
    "seed_everything": "0",
    "trainer.fast_dev_run": "0",
    "trainer.max_epochs": "-1 0",
    "trainer.min_epochs": "0",
    "trainer.max_steps": "-1 0",
    "trainer.min_steps": "0",
    "trainer.limit_train_batches": "0",
    "trainer.limit_val_batches": "0",
    "trainer.limit_test_batches": "0",
    "trainer.limit_predict_batches": "0",
    "trainer.overfit_batches": "0",
    "trainer.num_sanity_val_steps": "-1 0",
    "trainer.log_every_n_steps": "0",
    "trainer.gradient_clip_val": "0",
    "model.warmup_steps": "0",
    "model.method.success_threshold": "-1",
    "data.sampling.top_k": "0",
    "data.task.seed": "-1 0",
    "reversed_signal.picture_every_n_epochs": "0",
    "evaluation.table": "0",
    "checkpoint.save_top_k": "-1 0",
    "checkpoint.every_n_train_steps": "0",
    "checkpoint.every_n_epochs": "0",
}
"""Values that look invalid and are not: they mean no limit, or switch something off."""

QUICK = ["--trainer.logger=false", "--data.task.heldout=4", "--trainer.enable_checkpointing=true"]


class Ready(RLRTCli):
    """Does all that a run does before its first rollout."""

    def _run_subcommand(self, subcommand: str) -> None:
        self.datamodule.trainer = self.model.trainer = self.trainer
        self.trainer.strategy.connect(self.model)
        try:
            self.datamodule.setup("fit")
            self.model.optimizer_factory([nn.Parameter()])
        finally:
            self.datamodule.teardown("fit")

    def run_args(self, *args: str) -> int:
        """Runs another command line on the same parser, which takes 0.2 s to build; returns the exit code."""
        return run(lambda: self._run(self.parser.parse_args(["fit", *QUICK, *args])))

    def run_flag(self, setting: str, value: str) -> int:
        """Runs with one more flag."""
        return self.run_args(f"--{setting}={value}")

    def run_changed(self, setting: str, value: str) -> int:
        """Runs with a setting changed after parsing, which takes longer than the rest."""
        config = self.quick.clone()
        *groups, name = setting.split(".")
        node = config.fit
        for group in groups:
            node = node[group]
            node = node.get("init_args", node)
        node[name] = yaml.safe_load(value)
        return run(lambda: self._run(config))

    @cached_property
    def quick(self) -> Namespace:
        return self.parser.parse_args(["fit", *QUICK])

    def _run(self, config: Namespace) -> None:
        self._failure = None
        self.config = config
        self.before_instantiate_classes()
        self.instantiate_classes()
        self.after_instantiate_classes()
        self._run_subcommand("fit")


@pytest.fixture(scope="module")
def cli() -> Ready:
    return Ready(["fit", *QUICK])


def settings(cli: RLRTCli) -> Iterator[tuple[str, set[Any]]]:
    """All settings with their types, those of the default classes included."""
    (commands,) = (a.choices for a in actions(cli.parser) if isinstance(a.choices, dict))
    for action in actions(commands["fit"]):
        if (type_ := value_type(action)) is not None:
            yield action.dest, set(flat(type_))
            if (isinstance(action.default, dict) and "class_path" in action.default) or action.dest == "model.method":
                cls = getattr(rlrt_lightning, str(action.default["class_path"]).rpartition(".")[2], None)
                for name, parameter in inspect.signature(cls, eval_str=True).parameters.items() if cls else ():
                    yield f"{action.dest}.{name}", set(flat(parameter.annotation))


def flat(type_: Any) -> Iterator[Any]:
    """The plain types that a type allows; `Literal` stands for a list of values."""
    if get_origin(type_) in (Literal, list, tuple, dict):
        yield get_origin(type_)
    elif args := get_args(type_):
        for arg in args:
            yield from flat(arg) if not isinstance(arg, list) else ()
    else:
        yield type_


def refusal_defect(
    run_with: Callable[[str, str], int], capsys: pytest.CaptureFixture[str], setting: str, value: str
) -> str:
    """What is wrong with the refusal of a value; empty if one line names the setting."""
    capsys.readouterr()
    try:
        code = run_with(setting, value)
    except Exception as error:
        return f"{setting}={value}: {type(error).__name__}: {error}"
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Loading weights")]
    one = code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 600
    return "" if one and setting in lines[0] else f"{setting}={value}: {code}, {lines}"


@pytest.mark.parametrize(("most", "tried"), [(1, 40), pytest.param(None, 90, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_numbers_out_of_range_are_refused_by_name(
    most: int | None, tried: int, cli: Ready, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one value for each setting, which is parsed only if it is not refused without, or with all as flags."""

    def defect(setting: str, value: str) -> str:
        if most and not refusal_defect(cli.run_changed, capsys, setting, value):
            return ""
        return refusal_defect(cli.run_flag, capsys, setting, value)

    wrong = []
    for setting, types in settings(cli):
        values = {value for type_, numbers in NUMBERS.items() if type_ in types for value in numbers}
        values -= set(VALID.get(setting, "").split())
        wrong += [defect(setting, value) for value in sorted(values)[:most]]
    assert not [w for w in wrong if w]
    assert len(wrong) > tried


@pytest.mark.parametrize("step", slow_except([1, 3], 3))
@pytest.mark.filterwarnings("ignore")
def test_values_of_a_wrong_type_are_refused_by_name(step: int, cli: Ready, capsys: pytest.CaptureFixture[str]) -> None:
    # Any text may be a valid name or path.
    typed = [setting for setting, types in settings(cli) if not types & {str, Path, Any}]
    assert len(typed) > 110
    wrong = [refusal_defect(cli.run_flag, capsys, setting, "certainly_not") for setting in typed[::step]]
    assert not [w for w in wrong if w]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.optimizer.lr=-1"], "model.optimizer.lr: Invalid learning rate: -1.0"),
        (["--model.optimizer.lr=.inf"], "model.optimizer.lr is inf; it has to be a finite number"),
        (["--model.optimizer.betas=[2, 3]"], "model.optimizer.betas: Invalid beta parameter at index 0: 2.0"),
        (["--model.optimizer=null"], "model.optimizer: it has to be Optimizer; it is null"),
        (["--seed_everything=99999999999"], "seed_everything is 99999999999; it has to be an integer from 0 to"),
        (["--trainer.val_check_interval=5"], "trainer.val_check_interval is 5; it has to be at most 2, the batches"),
        (["--trainer.devices=99999"], "trainer.devices is 99999; it has to be at most "),
        (["--trainer.devices=0"], "trainer.devices: `Trainer(devices='0')`"),
        (["--trainer.accelerator=tpu"], "trainer.accelerator: "),
        (["--trainer.strategy=foo"], "trainer.strategy: You selected an invalid strategy name"),
        (["--trainer.callbacks+=EarlyStopping"], "trainer.callbacks.monitor: EarlyStopping needs a value for monitor"),
        (
            ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.mode=foo"],
            "trainer.callbacks.mode: `mode`",
        ),
        (["--trainer.callbacks+=HFExprt"], "trainer.callbacks: there is no class HFExprt (did you mean HFExport?)"),
        (["--data=null"], "data: it has to be a mapping of settings; it is null"),
        (["--data.task=DatasetTask"], "data.task.train: DatasetTask needs `train`, `heldout` or both"),
        (["--data.task.digits=[2, 3]"], "data.task.digits: digits must be within 4 to 8"),
        (["--data.engine.max_rows=0"], "data.engine.max_rows is 0; it has to be at least 1"),
        (["--data.engine=RLRT"], "data.engine: there is no class RLRT; choose from "),
        (
            ["--data.benchmarks.heldout.limit=-1"],
            "data.benchmarks.heldout.limit is -1; it has to be",
        ),
        (
            ["--data.benchmarks.heldout.sampling.top_p=2"],
            "data.benchmarks.heldout.sampling.top_p: ",
        ),
        (["--model.policy.lora.rank=0"], "model.policy.lora.rank is 0; it has to be at least 1"),
        (
            ["--model.method=rlrt_lightning.LastDigit"],
            "model.method: rlrt_lightning.LastDigit is not a subclass of",
        ),
        (["--model.method=rlrt_lightning.Foo"], "model.method: there is no class rlrt_lightning.Foo: module"),
        (["--lr=1"], "there is no setting --lr (did you mean --model.optimizer.lr?)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.filterwarnings("ignore")
def test_invalid_values_give_the_expected_message(
    cli: Ready, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert cli.run_args(*args) == 2
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(("logger", "package"), [("CometLogger", "comet-ml"), ("WandbLogger", "wandb")])
def test_a_logger_without_its_package_names_the_install_command(
    cli: Ready, capsys: pytest.CaptureFixture[str], logger: str, package: str
) -> None:
    if find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed")
    assert cli.run_args(f"--trainer.logger={logger}") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: trainer.logger: ")
    assert f"pip install -U '{package}" in line
    assert "Namespace" not in line


@pytest.mark.filterwarnings("ignore")
def test_a_folder_that_cannot_be_created_is_refused(
    cli: Ready, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.run_args("--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}/file/x") == 2
    assert "error: trainer.logger.save_dir: " in capsys.readouterr().err


def test_an_invalid_seed_in_the_environment_is_refused(
    cli: Ready, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "many")
    assert cli.run_args("--seed_everything=true") == 2
    assert "error: seed_everything: the environment's PL_GLOBAL_SEED is many" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is empty"),
        ("# model: {}", "it is empty"),
        ("- model\n- data", "it is a sequence; it has to be a mapping of settings"),
        ("model", "it is a scalar"),
        (
            "model:\n\tclip_low: 1",
            "line 2, column 1: found character '\\t' that cannot start any token; indent",
        ),
        ("trainer: {max_epochs: 2", "it is not YAML: line 1, column 24"),
        ("model: {clip_low: !!python/object:os.system x}", "it is not YAML: line 1, column 19"),
        ("a: &a [*a]", "it is nested too deeply"),
        ("a: " + "[" * 5000, "it is n"),
        (b"model: {method: caf\xe9}", "it is not UTF-8: byte 19 is 0xe9"),
        ("model: {clip_low: 0.1}\nmodel: {clip_high: 0.3}", "model is set twice, in lines 1 and 2"),
        ("data:\n  sampling:\n    top_p: 1\n    top_p: 0.9", "top_p is set twice, in lines 3 and 4"),
        ("data: {task: [{a: 1, a: 2}]}", "a is set twice"),
        ("data: duplicates.yaml", "duplicates.yaml: seed is set twice, in lines 1 and 2"),
        (
            "data:\n  task:\n    init_args:\n      answer_pattern: ####(.*)",
            "answer_pattern in line 4: ####(.*) is a comment in YAML; put it in quotes",
        ),
        ("model: {policy: [{system_prompt: #Be brief.\n}]}", "system_prompt in line 1: #Be brief."),
        ("config: duplicates.yaml", "a config cannot name another one; give each with --config"),
        ("model:", "model: it has to be a mapping of settings; it is null"),
        ("data: [1]", "data: it has to be a mapping of settings; it is [1]"),
        ("data: {sampling: 3}", "data.sampling: it has to be a mapping of settings; it is 3"),
        ("data: {benchmarks: {heldout: {samples: x}}}", "data.benchmarks.heldout.samples: it has to be int; it is x"),
        (
            "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: a, patience: b}}]}",
            ".patience: it has",
        ),
    ],
)
def test_invalid_config_files_are_refused(
    cli: Ready, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | bytes, message: str
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "duplicates.yaml").write_text("seed: 1\nseed: 2\n")
    assert cli.run_args(f"--config={file}") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_missing_config_files_are_refused(cli: Ready, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "rlrt.yaml").write_text("model: {clip_low: 0.1}")
    for args, message in (
        ([f"--config={tmp_path}/rltr.yaml"], f"there is no such file (did you mean {tmp_path}/rlrt.yaml?)"),
        (["--config", str(tmp_path)], "it is a folder; name a file in it"),
        (["--config="], "--config: give the name of a file"),
        (["--config"], "--config: give the name of a file"),
    ):
        assert cli.run_args(*args) == 2
        assert message in capsys.readouterr().err


def test_given_lists_the_settings_of_configs_and_flags_in_order() -> None:
    config = "{model: {method: {class_path: RLSD, init_args: {lam: 0.2}}}, trainer: {callbacks: [{class_path: A}]}}"
    flags = ["--model.method.init_args.lam=0.3", "--trainer.callbacks+=B", "--data.ahead", "true"]
    assert given(["fit", "--config", config, *flags]) == [
        ("model.method", "RLSD"),
        ("model.method.lam", 0.2),
        ("trainer.callbacks", "A"),
        ("model.method.lam", "0.3"),
        ("trainer.callbacks", "B"),
        ("data.ahead", "true"),
    ]
    assert given([]) == []


class OfTheUser(Callback):
    """A user's callback that fails in the given way."""

    def __init__(self, how: str = "", limit: int = 0) -> None:
        if how == "refuses":
            raise ValueError(f"limit is {limit}, and should not be")
        if how == "calls itself wrongly":
            len(5)  # type: ignore[arg-type]
        if how == "looks for a key":
            {}["no"]
        self.how = how

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise RuntimeError("a fault in the user's own code")


@pytest.mark.filterwarnings("ignore")
def test_errors_in_user_code_keep_their_traceback(cli: Ready, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"--trainer.callbacks+={__name__}.OfTheUser"
    assert cli.run_args(name, "--trainer.callbacks.how=refuses", "--trainer.callbacks.limit=3") == 2
    assert "error: trainer.callbacks.limit: limit is 3" in capsys.readouterr().err
    assert cli.run_args(name, "--trainer.callbacks.limits=3") == 2
    assert "OfTheUser has no setting limits (did you mean limit?)" in capsys.readouterr().err
    for how, error in (("calls itself wrongly", TypeError), ("looks for a key", KeyError)):
        with pytest.raises(error):
            cli.run_args(name, f"--trainer.callbacks.how={how}")
    with pytest.raises(RuntimeError, match="user's own code"):
        main(["fit", *QUICK, name, "--trainer.num_sanity_val_steps=0", "--trainer.max_epochs=1"])


SMALL = [
    "--data.prompts_per_epoch=2",
    "--data.rollouts_per_prompt=2",
    "--data.minibatches=1",
    "--data.sampling.max_new_tokens=4",
    "--trainer.max_epochs=1",
    "--trainer.limit_val_batches=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_checkpointing=false",
]


@pytest.mark.filterwarnings("ignore")
def test_errors_that_lightning_finds_late_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stopping = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=nowhere"]
    assert main(["fit", *QUICK, *SMALL, *stopping]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: EarlyStopping.monitor is nowhere, which is not logged")

    monkeypatch.setattr("lightning.pytorch.callbacks.device_stats_monitor._PSUTIL_AVAILABLE", False)
    monkeypatch.setattr("rlrt_lightning.cli.refusals.find_spec", lambda name: None)
    monkeypatch.setattr(RolloutDataModule, "draw", None)  # the run ends before it draws
    logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}"]
    assert main(["fit", *QUICK, *logger, *SMALL, "--trainer.callbacks+=DeviceStatsMonitor"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: trainer.callbacks: `DeviceStatsMonitor` cannot log CPU stats")
    assert line.endswith("; pip install psutil")


def test_a_misspelt_command_suggests_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fti"]) == 2
    assert "there is no command fti; choose from fit, validate" in (err := capsys.readouterr().err)
    assert "(did you mean fit?)" in err


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["curves", "nowhere"], "error: nowhere has to be NAME=FOLDER, such as RLRT=runs/last-digit/rlrt-0"),
        pytest.param(
            ["fit", "--model.clip_low=-1", "--trainer.logger=false"],
            "error: model.clip_low is -1.0; it has to be from 0 to below 1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_process_ends_with_exit_code_2_and_one_line(args: list[str], line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rlrt_lightning", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert [each for each in done.stderr.splitlines() if "Seed set" not in each] == [line]
