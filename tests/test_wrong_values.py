"""Every setting with values that it cannot have: one line that names it, and exit code 2, before any rollout."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from torch import nn

import rlrt_lightning
from rlrt_lightning.cli import RLRTCli
from rlrt_lightning.refusals import run

NUMBERS = {int: ("-1", "0", "1.5"), float: ("-1", "0", ".nan", ".inf")}

VALID = {
    "seed_everything": "0",
    "trainer.fast_dev_run": "0",
    "trainer.max_epochs": "-1 0",
    "trainer.min_epochs": "0",
    "trainer.max_steps": "-1 0",
    "trainer.min_steps": "0",
    "trainer.limit_train_batches": "0 1.5",
    "trainer.limit_val_batches": "0",
    "trainer.limit_test_batches": "0",
    "trainer.limit_predict_batches": "0",
    "trainer.overfit_batches": "0",
    "trainer.num_sanity_val_steps": "-1 0",
    "trainer.log_every_n_steps": "0",
    "trainer.gradient_clip_val": "0 1.5",
    "model.clip_low": "0",
    "model.clip_high": "0",
    "model.warmup_steps": "0",
    "model.optimizer.lr": "0",
    "model.optimizer.eps": "0",
    "model.optimizer.weight_decay": "0",
    "model.method.lam": "0",
    "model.method.eps_w": "0",
    "model.method.success_threshold": "-1 0",
    "data.sampling.top_k": "0",
    "data.sampling.min_p": "0",
    "data.max_fault_share": "0",
    "data.task.seed": "-1 0",
    "teacher_refresh.ema_decay": "0",
    "reversed_signal.picture_every_n_epochs": "0",
    "evaluation.table": "0",
    "checkpoint.save_top_k": "-1 0",
    "checkpoint.every_n_train_steps": "0",
    "checkpoint.every_n_epochs": "0",
}
"""What looks wrong and is not: no limit, or switched off."""

QUICK = ["--trainer.logger=false", "--data.task.heldout=4", "--trainer.enable_checkpointing=true"]


class Ready(RLRTCli):
    """Goes as far as a run goes before its first rollout."""

    def _run_subcommand(self, subcommand: str) -> None:
        self.datamodule.trainer = self.model.trainer = self.trainer
        self.trainer.strategy.connect(self.model)
        try:
            self.datamodule.setup("fit")
            self.model.optimizer_factory([nn.Parameter()])
        finally:
            self.datamodule.teardown("fit")

    def again(self, *words: str) -> int:
        """Another command line on the same parser, which takes a fifth of a second to build."""

        def command() -> None:
            self._failure = None
            self.config = self.parser.parse_args(["fit", *QUICK, *words])
            self.before_instantiate_classes()
            self.instantiate_classes()
            self.after_instantiate_classes()
            self._run_subcommand("fit")

        return run(command)


@pytest.fixture(scope="module")
def cli() -> Ready:
    return Ready(["fit", *QUICK])


def settings(cli: RLRTCli) -> Iterator[tuple[str, set[Any]]]:
    """All settings with their types, those of the default classes included."""
    (commands,) = (a.choices for a in cli.parser._actions if isinstance(a.choices, dict))
    for action in commands["fit"]._actions:
        if (type_ := getattr(action, "_typehint", None)) is not None:
            yield action.dest, set(flat(type_))
            if (isinstance(action.default, dict) and "class_path" in action.default) or action.dest == "model.method":
                cls = getattr(rlrt_lightning, str(action.default["class_path"]).rpartition(".")[2], None)
                for name, parameter in inspect.signature(cls, eval_str=True).parameters.items() if cls else ():
                    yield f"{action.dest}.{name}", set(flat(parameter.annotation))


def flat(type_: Any) -> Iterator[Any]:
    """The plain types among those that a type allows; `Literal` stands for what has a list of values."""
    if get_origin(type_) in (Literal, list, tuple, dict):
        yield get_origin(type_)
    elif args := get_args(type_):
        for arg in args:
            yield from flat(arg) if not isinstance(arg, list) else ()
    else:
        yield type_


def refused(cli: Ready, capsys: pytest.CaptureFixture[str], setting: str, value: str) -> str:
    """Why it is not right: an empty string where it is refused in one line that names the setting."""
    capsys.readouterr()
    try:
        code = cli.again(f"--{setting}={value}")
    except Exception as error:
        return f"{setting}={value}: {type(error).__name__}: {error}"
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Loading weights")]
    one = code == 2 and len(said) == 1 and said[0].startswith("error: ") and len(said[0]) < 600
    return "" if one and setting in said[0] else f"{setting}={value}: {code}, {said}"


@pytest.mark.filterwarnings("ignore")
def test_numbers_out_of_range(cli: Ready, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, tried = [], 0
    for setting, types in settings(cli):
        values = dict.fromkeys(v for type_, vs in NUMBERS.items() if type_ in types for v in vs)
        if float in types:
            values.pop("1.5", None)
        for value in set(values) - set(VALID.get(setting, "").split()):
            wrong.append(refused(cli, capsys, setting, value))
            tried += 1
    assert not [w for w in wrong if w]
    assert tried > 150


@pytest.mark.filterwarnings("ignore")
def test_values_of_another_type(cli: Ready, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, tried = [], 0
    for setting, types in settings(cli):
        for value in ("certainly_not", "[[]]"):
            # Text goes where a name or a path goes, and anything where the type says nothing.
            if types & ({str, Path, Any} if value == "certainly_not" else {str, Path, Any, list}):
                continue
            wrong.append(refused(cli, capsys, setting, value))
            tried += 1
    assert not [w for w in wrong if w]
    assert tried > 150
