"""Help texts and error messages that lead to the right class."""

from __future__ import annotations

import pytest

from rlrt_lightning.__main__ import main
from tests.helpers.processes import ROOT

RLRT_YAML = f"--config={ROOT / 'configs' / 'rlrt.yaml'}"


@pytest.mark.parametrize(
    ("setting", "classes"),
    [
        ("model.method", "DIVER EntropyBonus GRPO RLRT RLSD SDPO SRPO"),
        ("data.engine", "TransformersEngine VllmColocateEngine VllmServerEngine"),
        ("data.task", "DatasetTask LastDigit ReasoningGym"),
    ],
)
def test_help_without_a_class_lists_the_classes(setting: str, classes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["fit", f"--{setting}.help"])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[1:-1]]
    assert set(classes.split()) <= set(names)
    assert not {"Method", "RolloutEngine", "VllmEngine", "Task"} & set(names), "abstract classes"
    assert all(line.split(None, 1)[1] for line in lines[1:-1]), "each with what it is"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--data.task.prompt=question", "data.task.prompt: LastDigit has no setting prompt; DatasetTask has it"),
        ("--data.task.train=a.jsonl", "data.task.train: it has to be int; it is a.jsonl; data files are read by "
         "DatasetTask: --data.task=DatasetTask"),
        ("--model.lr=1e-3", "there is no setting --model.lr (did you mean --model.optimizer.lr?)"),
        ("--lr=1e-3", "there is no setting --lr (did you mean --model.optimizer.lr?)"),
        ("--data.task.reward.help", "data.task.reward.help: name a class, as in --data.task.help NAME, which shows its "
         "settings"),
    ],
)  # fmt: skip
def test_a_setting_of_another_class_is_refused_with_that_class(
    flag: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", RLRT_YAML, flag]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == f"error: {message}"
