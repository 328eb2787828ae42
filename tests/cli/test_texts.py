"""Texts that mean something else in YAML reach their settings unchanged, from flags, configs and printed configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrt_lightning.cli.argument_errors import RLRTParser
from rlrt_lightning.cli.values import dump, load
from rlrt_lightning.runtime.errors import ConfigError
from tests.helpers.command_line import ParsingCli
from tests.helpers.marks import slow_except
from tests.helpers.processes import ROOT

TEXTS = [
    *("####(.*)", "#", "# Be brief", "a # b", "####", "x\n#y", "Question: {prompt}\nAnswer: 4"),
    *("yes", "1e-5", "1", "007", "1_000", "0x10", "1.50", "2020-01-01", "true", "~", "None", "Null", "!!null x"),
    *("[a]", "[0-9]+", "[1, 2]", "{x}", "{a: 1}", "a: b", "a:", "- x", "-", "---", "...", "", " ", " x "),
    *("&a", "*a", "@a", "%a", "'q'", '"q"', "{a: ["),
]
NAMES = (
    "data.task.answer_pattern",  # str or null
    "data.task.prompt_template",  # str
    "data.task.reward.pattern",  # of a class in a class
    "model.policy.system_prompt",
    "model.teacher.template",
    "trainer.logger.name",
)
TASK = ("--data.task=DatasetTask", "--data.task.train=a.jsonl", "--data.task.reward=ExactMatch")


@pytest.fixture(scope="module")
def parser() -> RLRTParser:
    return ParsingCli(["fit"]).parser


def texts_of(settings: Any) -> list[Any]:
    """The values of `NAMES`."""
    task, model = settings.data.task.init_args, settings.model
    in_task = [task.answer_pattern, task.prompt_template, task.reward.init_args.pattern]
    return [*in_task, model.policy.system_prompt, model.teacher.template, settings.trainer.logger.init_args.name]


def printed(parser: RLRTParser, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The config that `--print_config` prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        parser.parse_args(["fit", *words, "--print_config"])
    return capsys.readouterr().out


@pytest.mark.parametrize("text", slow_except(TEXTS, "####(.*)", "1e-5", "~", "[0-9]+", "a: b", "---", ""))
def test_a_text_survives_a_flag_a_config_and_a_printed_config(
    parser: RLRTParser, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TASK, *(f"--{name}={text}" for name in NAMES)]
    expected = [text] * len(NAMES)
    assert texts_of(parser.parse_args(["fit", *flags]).fit) == expected
    task = {"train": "a", "answer_pattern": text, "prompt_template": text}
    task["reward"] = {"class_path": "ExactMatch", "init_args": {"pattern": text}}  # type: ignore[assignment]
    written: dict[str, Any] = {
        "data": {"task": {"class_path": "DatasetTask", "init_args": task}},
        "model": {"policy": {"system_prompt": text}, "teacher": {"template": text}},
        "trainer": {"logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "a", "name": text}}},
    }
    own = yaml.safe_dump(written, default_style='"')
    for name, content in (("own.yaml", own), ("printed.yaml", printed(parser, flags, capsys))):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert texts_of(parser.parse_args(["fit", f"--config={tmp_path / name}"]).fit) == expected, name


def test_null_is_null_where_a_setting_may_be_null_and_a_text_elsewhere(parser: RLRTParser) -> None:
    settings = parser.parse_args(["fit", *TASK, *(f"--{name}=null" for name in NAMES)]).fit
    assert texts_of(settings) == [None, "null", "null", None, None, None]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--trainer.max_epochs=#5", "trainer.max_epochs: it has to be int or null; it is #5"),
        ("--data.engine.max_rows=#5", "data.engine.max_rows: it has to be int; it is #5"),
        ("--data.tokens_per_pass=---", "data.tokens_per_pass: it has to be int or null; it is ---"),
    ],
)
def test_a_text_without_a_value_is_not_null_for_other_types(parser: RLRTParser, flag: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parser.parse_args(["fit", flag])
    assert str(error.value) == message


def test_lists_and_dicts_of_nested_classes_are_still_read(parser: RLRTParser) -> None:
    found = parser.parse_args(
        [
            *("fit", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.betas=[0.8, 0.9]", *TASK[:2]),
            *("--data.task.reward={a: ExactMatch, b: MathReward}", "--data.task.reward_weights={a: 0.5}"),
            *("--data.task.reward_weights.b=0.25", "--data.benchmarks.heldout={samples: 3}"),
            *("--model.policy.lora.targets=[q, v]", "--trainer.logger.dict_kwargs={max_queue: 4}"),
        ]
    ).fit
    task = found.data.task.init_args
    assert list(found.model.optimizer.init_args.betas) == [0.8, 0.9]
    assert {name: reward.class_path.rpartition(".")[2] for name, reward in task.reward.items()} == {
        "a": "ExactMatch",
        "b": "MathReward",
    }
    assert task.reward_weights == {"a": 0.5, "b": 0.25}
    assert found.data.benchmarks["heldout"].samples == 3
    assert found.model.policy.lora.targets == ["q", "v"]
    assert found.trainer.logger.init_args.max_queue == 4


def test_a_printed_config_resolves_to_the_same_settings(
    parser: RLRTParser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "printed.yaml"
    config.write_text(printed(parser, [f"--config={ROOT}/configs/rlrt.yaml"], capsys))
    assert printed(parser, [f"--config={config}"], capsys) == config.read_text()


def test_several_rewards_survive_a_printed_config(
    parser: RLRTParser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "printed.yaml"
    words = [
        *TASK[:2],
        "--data.task.reward={a: {class_path: ExactMatch, init_args: {pattern: '[a]'}}, b: builtins.len}",
    ]
    config.write_text(printed(parser, words, capsys))
    first, second = (parser.parse_args(["fit", *some]).fit for some in (words, [f"--config={config}"]))
    saved = load(parser.dump(parser.parse_args(["fit", *words])))["fit"]["data"]["task"]["init_args"]["reward"]
    assert saved["a"]["init_args"]["pattern"] == "[a]"
    assert first.data.task.init_args.reward == second.data.task.init_args.reward
    assert first.data.task.init_args.reward["a"].init_args.pattern == "[a]"
    assert first.data.task.init_args.reward["b"] is len


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"))) | st.from_regex(r"[-+.\de_:]+"))
def test_what_is_written_is_read_as_the_same_text(text: str) -> None:
    assert load(dump({"text": text, "list": [text]})) == {"text": text, "list": [text]}
