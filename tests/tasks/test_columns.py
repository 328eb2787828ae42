"""Columns beyond plain text: messages, lists and dicts, as objects and as text; duplicate keys."""

from __future__ import annotations

import csv
import json
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlrt_lightning import Teacher
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.tasks import DatasetTask, ExactMatch
from rlrt_lightning.tasks.notation import loads, parsed

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What's \\(2+2\\)?\nSay it."}
ASSISTANT = {"role": "assistant", "content": "It is 4."}
CHAT = [SYSTEM, USER]
SHAREGPT = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": USER["content"]}]
UNREADABLE = "looks like messages but is neither JSON nor a Python literal; write it as JSON"
NO_MESSAGES = "has items that are not messages with a role and text content"


def read(path, **settings):
    return DatasetTask(train=str(path), **{"prompt": "prompt", "answer": "answer", **settings}).problems("train")


def read_row(tmp_path, ending="jsonl", reward=None, solution=None, **row):
    """Writes a file of one row, and returns its problem."""
    path = tmp_path / f"a.{ending}"
    row = {"prompt": "2+2?", "answer": "4", **row}
    if ending == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([row.keys(), row.values()])
    else:
        path.write_text(json.dumps(row) + "\n")
    (problem,) = read(path, reward=reward, solution=solution)
    return problem


def row_error(tmp_path, **row):
    """The cause that is named for a file whose only row is bad."""
    with pytest.raises(ConfigError, match="no usable row: row 1: ") as error:
        read_row(tmp_path, **row)
    assert "\n" not in str(error.value)
    return str(error.value).partition("row 1: ")[2]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (repr(CHAT), CHAT),
        (json.dumps(CHAT), CHAT),
        (repr(tuple(CHAT)), CHAT),
        (f"\n {CHAT!r} ", CHAT),
        (json.dumps(json.dumps(CHAT)), CHAT),
        (repr(USER), [USER]),
        (json.dumps(USER), [USER]),
        (repr(SHAREGPT), CHAT),
        (json.dumps(SHAREGPT), CHAT),
        (repr(SHAREGPT[1]), [USER]),
        (repr({"messages": CHAT}), CHAT),
        (json.dumps({"conversations": SHAREGPT}), CHAT),
        ("[{'role': 'user',\n  'content': r'a\\(b'}]", [{"role": "user", "content": "a\\(b"}]),
    ],
)
def test_conversations_are_parsed_from_json_and_python_text(tmp_path, ending, text, prompt):
    assert read_row(tmp_path, ending, prompt=text).prompt == prompt


@pytest.mark.parametrize(
    ("value", "prompt"),
    [
        (USER, [USER]),
        (SHAREGPT, CHAT),
        (SHAREGPT[1], [USER]),
        ({"messages": CHAT}, CHAT),
        (
            [{**dict.fromkeys(["role", "content"]), **message} for message in SHAREGPT],
            CHAT,
        ),  # with the columns of both layouts
    ],
)
def test_conversations_are_read_from_objects(tmp_path, value, prompt):
    assert read_row(tmp_path, prompt=value).prompt == prompt


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (str(np.array(CHAT, dtype=object)), UNREADABLE),
        (repr(np.array(CHAT, dtype=object)), UNREADABLE),
        (repr(CHAT)[:-5], UNREADABLE),
        (f"{CHAT!r} and more", UNREADABLE),
        ("[{'role': 'user', 'content': 'a', 'name': null}]", UNREADABLE),
        ("[{'role': 'user', 'content': 'a', 'name': nan}]", UNREADABLE),
        ("[{'role': 'user', 'content': array(['a'])}]", UNREADABLE),
        ("[{'role': 'user', 'content': __import__('os').abort()}]", UNREADABLE),
        ("[{'role': 'user', 'content': 'a' 'b'}]", UNREADABLE),
        (repr([*CHAT, ASSISTANT]), "does not end with a user message"),
        (repr([*CHAT, {"role": "user"}]), NO_MESSAGES),
        (json.dumps([*CHAT, "2+2?"]), NO_MESSAGES),
        (json.dumps([{"from": "tool", "value": "x"}, *SHAREGPT]), NO_MESSAGES),
        ('[{"role": "system", "role": "user", "content": "a"}]', "an object has the key 'role' twice"),
        ("[{'role': 'system', 'role': 'user', 'content': 'a'}]", "an object has the key 'role' twice"),
    ],
)
def test_unreadable_conversations_are_bad_rows(tmp_path, text, message):
    assert message in row_error(tmp_path, prompt=text)


@pytest.mark.parametrize(
    "text",
    [
        "[x] is the floor of x. What is [2.5]?",
        "[1, 2, 3] has how many entries?",
        "['a', 'b']",
        "[{'a': 1}, {'b': 2}]",
        "[{'a': 1}\n {'b': 2}]",
        '{"a": 1} has how many keys?',
        "{'role': 'user'}",
        "(1, 2) and [",
        "What does [{'role': 'user', 'content': 'hi'}] mean?",
        "[" * 9000,
        "[{'role': " * 500,
    ],
)
def test_text_that_only_looks_like_a_list_stays_the_prompt(tmp_path, text):
    assert read_row(tmp_path, prompt=text).prompt == text


@pytest.mark.parametrize(
    ("value", "solution"),
    [
        ("Add them.", "Add them."),
        ("[a] is the floor of a.", "[a] is the floor of a."),
        ("['x'] is a list", "['x'] is a list"),
        ('{"a": 1}', '{"a": 1}'),
        (["First way", "Second way"], "First way"),
        (["", None, "Second way"], "Second way"),
        (repr(["First way", "Second's"]), "First way"),
        (json.dumps(["First way", "Second way"]), "First way"),
        ([*CHAT, ASSISTANT], "It is 4."),
        (ASSISTANT, "It is 4."),
        (repr([*CHAT, ASSISTANT]), "It is 4."),
        (json.dumps([SHAREGPT[1], {"from": "gpt", "value": "It is 4."}]), "It is 4."),
        ([ASSISTANT, USER, {**ASSISTANT, "content": "No, 5."}], "No, 5."),
        (4, "4"),
        (0, "0"),
        (42.0, "42"),
        *[(empty, None) for empty in (None, "", " ", [], {}, [""], [None], float("nan"))],
    ],
)
def test_solutions_of_every_type_become_text(tmp_path, value, solution):
    assert read_row(tmp_path, solution="worked", worked=value).solution == solution


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"text": "x"},
            "neither text, messages nor a list of strings but dict; name one of its keys, as in worked.text",
        ),
        (repr({"text": "x"}), "but dict; name one of its keys"),
        ([1, 2], "but list"),
        ([["First"], ["Second"]], "but list"),
        ([{"text": "x"}], "but list"),
        (repr([{"text": "x"}]), "but list"),
        (["a", {"b": 1}], "but list"),
        (CHAT, "has no assistant message"),
        ([{"role": "assistant", "content": None}], NO_MESSAGES),
        (str(np.array(["First way", "Second way"])), "looks like a list of strings but is neither JSON nor a Python"),
        (str(np.array(CHAT, dtype=object)), UNREADABLE),
        ("\ud800", "not UTF-8"),
    ],
)
def test_solutions_without_text_are_bad_rows(tmp_path, value, message):
    error = row_error(tmp_path, solution="worked", worked=value)
    assert "worked" in error
    assert message in error


@pytest.mark.parametrize(
    ("value", "answer", "message"),
    [
        (["4", ""], "4", "4"),
        (["4", None, "5"], ["4", "5"], "4 or 5"),
        ([float("nan"), 5], 5, "5"),
        ({"ground_truth": "5", "style": "rule"}, "5", "5"),
        ({"ground_truth": {"ground_truth": ["5", ""]}}, "5", "5"),
        (json.dumps({"ground_truth": "5"}), "5", "5"),
        (repr({"ground_truth": "5"}), "5", "5"),
        ('["34"]', "34", "34"),
        (repr(["4", None, "5"]), ["4", "5"], "4 or 5"),
        ("[4, 5]", "[4, 5]", "[4, 5]"),
        (r"\{\}", r"\{\}", r"\{\}"),
        (1e-05, 1e-05, "0.00001"),
        (True, True, "True"),
    ],
)
def test_ground_truths_of_every_layout_are_read(tmp_path, value, answer, message):
    problem = read_row(tmp_path, answer=value)
    assert (problem.answer, problem.answer_text) == (answer, message)
    task = DatasetTask(train="unused")
    assert task.verify(problem, rf"\boxed{{{message.partition(' or ')[0]}}}").correct
    assert not task.verify(problem, r"\boxed{.}").correct


@pytest.mark.parametrize("reward", [None, ExactMatch()])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"target": 5, "numbers": [1]}, "is a dict without a ground_truth (its keys: target, numbers)"),
        ({"ground_truth": {"target": 5}}, "is a dict without a ground_truth (its keys: target)"),
        ([["4"], ["5"]], "the answer in answer is neither text nor a number but list"),
        ([{"a": 1}], "the answer in answer is neither text nor a number but dict"),
        ({"ground_truth": ""}, "no answer in answer"),
        ({"ground_truth": [None]}, "no answer in answer"),
        (["", None], "no answer in answer"),
        ('{"ground_truth": "4", "ground_truth": "5"}', "an object has the key 'ground_truth' twice"),
    ],
)
def test_ground_truths_that_our_rewards_cannot_use_are_bad_rows(tmp_path, value, message, reward):
    assert message in row_error(tmp_path, answer=value, reward=reward)


@pytest.mark.parametrize("value", [".", "$$", "{}", [r"\,"], '{"target": "5"}', "['4' '5']"])
def test_ground_truths_that_no_formula_can_equal_are_bad_rows(tmp_path, value):
    assert "answer" in row_error(tmp_path, answer=value)
    assert read_row(tmp_path, answer=value, reward=ExactMatch()).answer in (value, r"\,")  # ExactMatch compares text


def constant_reward(problem, completion):
    return 1.0


def test_a_custom_reward_gets_the_ground_truth_unchanged(tmp_path):
    for value in ({"target": 5, "numbers": [1, 2]}, ["4", None], [["a"]], "[]"):
        assert read_row(tmp_path, answer=value, reward=constant_reward).answer == value


def test_ground_truths_become_readable_contexts(tmp_path):
    problems = [
        read_row(tmp_path, answer=["5", "7"]),
        read_row(tmp_path, answer=42.0),
        read_row(tmp_path, answer={"target": 5}, reward=constant_reward),
    ]
    rollouts: Any = [SimpleNamespace(group=i) for i in range(3)]
    contexts = Teacher().contexts("answer", problems, rollouts, torch.ones(3).bool())
    assert contexts == ["5 or 7", "42", '{"target": 5}']


# -- duplicate keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,answer,answer\nq,4,5\n", r"a\.csv: its first line names the column 'answer' twice$"),
        ("a.csv", "\ufeffprompt,prompt,answer\nq,r,5\n", r"a\.csv: .* names the column 'prompt' twice$"),
        ("a.jsonl", '{"prompt": "q", "answer": "4", "answer": "5"}\n', r"a\.jsonl.* the key 'answer' twice"),
        ("a.jsonl", '\ufeff{"prompt": "q", "prompt": "r", "answer": "5"}', r"a\.jsonl.* the key 'prompt' twice"),
        ("a.jsonl", '{"prompt": "q", "answer": {"ground_truth": 1, "ground_truth": 2}}', "key 'ground_truth' twice"),
        ("a.json", '[{"prompt": "q", "answer": "4", "answer": "5"}]', r"a\.json: .*the key 'answer' twice$"),
        ("a.json", '{"prompt": "q", "answer": "4", "answer": "5"}', r"a\.json: .*the key 'answer' twice$"),
        ("a.json", '{"prompt": "q", "answer": "4"}\n{"answer": "4", "answer": "5"}', "row 2: .*key 'answer' twice"),
    ],
)
@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_duplicate_columns_and_keys_are_refused(tmp_path, name, content, message, bad_rows):
    (tmp_path / name).write_text(content, encoding="utf-8")
    if "row 2" in message and bad_rows == "skip":
        with pytest.warns(UserWarning, match=message):
            assert len(read(tmp_path / name, bad_rows=bad_rows)) == 1
        return
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path / name, bad_rows=bad_rows)
    assert "\n" not in str(error.value)


def test_duplicate_keys_in_unused_text_and_unnamed_columns_are_allowed(tmp_path):
    (tmp_path / "a.csv").write_text(',prompt,answer,,\n0,q,4,,\n1,"{""a"": 1, ""a"": 2}",5,,\n')
    assert [problem.prompt for problem in read(tmp_path / "a.csv")] == ["q", '{"a": 1, "a": 2}']
    problem = read_row(tmp_path, more='{"a": 1, "a": 2}')
    assert problem.info["more"] == '{"a": 1, "a": 2}'


def test_dicts_printed_by_python_are_parsed(tmp_path):
    row = {"reward_model": repr({"ground_truth": "4", "style": "rule"}), "more": repr({"index": 1})}
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "q", **row}))
    (problem,) = read(tmp_path / "a.jsonl", answer="reward_model.ground_truth")
    assert (problem.answer, problem.info["more"]) == ("4", {"index": 1})


def test_parquet_refuses_duplicate_columns_and_reads_short_floats_as_decimals(tmp_path):
    import pyarrow
    import pyarrow.parquet

    def write(names, *columns):
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=names), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    texts = pyarrow.array(["q"])
    with pytest.raises(ConfigError, match=r"a\.parquet: .*answer") as error:
        read(write(["prompt", "answer", "answer"], texts, texts, texts))
    assert "\n" not in str(error.value)
    for number, kind in [(0.1, pyarrow.float32()), (0.5, pyarrow.float16()), (1e-05, pyarrow.float64())]:
        array = pyarrow.array([np.dtype(kind.to_pandas_dtype()).type(number)], kind)
        (problem,) = read(write(["prompt", "answer"], texts, array))
        assert problem.answer == number
        assert ExactMatch()(problem, f"{Decimal(str(number)):f}").correct


def test_parsed_reads_literals_and_returns_other_text_unchanged():
    assert parsed("{'a': [1, None, True, (2,)]}") == {"a": [1, None, True, (2,)]}
    assert parsed('{"a": [1, null, true]}') == {"a": [1, None, True]}
    assert loads("[1]") == [1]
    for text in (
        "f()",
        "a.b",
        "[1",
        "['a' 'b']",
        "lambda: 1",
        "1 if 1 else 2",
        "-" * 100_000 + "1",
        "(" * 5_000,
        "\x00",
    ):
        assert parsed(text) == text
