"""Reading problems: every variant of verl's layout, every file type, and one clear line for each error."""

from __future__ import annotations

import json
import pickle
import warnings

import pytest
from jsonargparse import ArgumentParser

from rlrt_lightning.runtime import hub
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.tasks import DatasetTask, ExactMatch, MathReward, Problem, Task, Verdict

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]


def row(prompt=CHAT, answer="2", **more):
    return {"prompt": prompt, "reward_model": {"ground_truth": answer, "style": "rule"}, **more}


def write(path, rows):
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path, **settings):
    return list(DatasetTask(train=str(path), **settings).problems("train"))


@pytest.mark.parametrize(
    ("name", "count"),
    [("dapo_math_512", 512), ("math500", 500), ("aime24", 30), ("aime25", 30), ("amc23", 40)],
)
def test_real_files_in_both_verl_layouts_are_read_by_default(shared, name, count):
    problems = read(shared / "data" / f"{name}.parquet")
    assert len(problems) == len({problem.id for problem in problems}) == count
    for problem in problems:
        assert [message["role"] for message in problem.prompt] == ["user"]
        assert problem.prompt[-1]["content"].endswith(r"\boxed{}.")
        assert isinstance(problem.answer, str)
        assert isinstance(problem.info["extra_info"], dict)


def test_a_dotted_column_name_reads_inside_json_text(shared):
    problems = read(shared / "data" / "math500.parquet", solution="extra_info.solution")
    assert all("boxed" in problem.solution for problem in problems)


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "json"])
@pytest.mark.parametrize("as_text", [False, True])
def test_conversations_are_read_as_lists_and_as_json_text(tmp_path, ending, as_text):
    rows = [row(json.dumps(CHAT) if as_text else CHAT, extra_info={"index": 1})]
    if as_text:
        rows[0]["reward_model"] = json.dumps(rows[0]["reward_model"])
    (problem,) = read(write(tmp_path / f"a.{ending}", rows))
    assert problem.prompt == CHAT
    assert problem.answer == "2"
    assert problem.info["extra_info"] == {"index": 1}
    assert problem.solution is None


def test_csv_is_read_with_flat_and_dotted_column_names(tmp_path):
    (tmp_path / "a.csv").write_text('question,reward_model.ground_truth,key\n"What is\n1+1, say?",2,x\n2+2?,4,y\n')
    problems = read(tmp_path / "a.csv", prompt="question", id="key")
    assert problems[0].prompt == "What is\n1+1, say?"
    assert [(problem.id, problem.answer) for problem in problems] == [("x", "2"), ("y", "4")]


@pytest.mark.parametrize(
    "text", ["[1, 2]", "[]", '["a"]', '{"role": "user"}', "[x] is the floor of x", '[{"a": 1}]', "[" * 9000]
)
def test_json_text_that_is_not_a_conversation_is_the_prompt(tmp_path, text):
    (problem,) = read(write(tmp_path / "a.jsonl", [row(text)]))
    assert problem.prompt == text


def test_the_files_of_a_folder_are_read_in_name_order(tmp_path):
    write(tmp_path / "b.jsonl", [row("third")])
    write(tmp_path / "a.parquet", [row("first"), row("second")])
    (tmp_path / "README.md").write_text("not data")
    assert [problem.prompt for problem in read(tmp_path)] == ["first", "second", "third"]


def test_the_template_fills_the_last_user_message_and_keeps_other_braces(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(), row("1+1?")])
    chat, text = read(path, prompt_template=r"{prompt} Answer in \boxed{}.")
    assert chat.prompt == [CHAT[0], {"role": "user", "content": r"1+1? Answer in \boxed{}."}]
    assert text.prompt == r"1+1? Answer in \boxed{}."


def test_answers_may_be_numbers_and_lists(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(answer=0), row(answer=False), row(answer=["1", "2"])])
    assert [problem.answer for problem in read(path)] == [0, False, ["1", "2"]]


BAD = [
    (row(""), "no prompt in prompt"),
    (row(None), "no prompt in prompt"),
    (row([]), "no prompt in prompt"),
    (row([{"role": "user", "content": " "}]), "no prompt in prompt"),
    (row(7), "neither text nor a list of messages but int"),
    (row(["hello"]), "items that are not messages"),
    (row([{"role": "user", "content": [{"type": "image"}]}]), "items that are not messages"),
    (row([*CHAT, {"role": "assistant", "content": "2"}]), "does not end with a user message"),
    (row(answer=None), "no answer in reward_model.ground_truth"),
    (row(answer="  "), "no answer in reward_model.ground_truth"),
    (row(answer=float("nan")), "no answer in reward_model.ground_truth"),
    ({"prompt": "1+1?", "reward_model": "2"}, "no answer in reward_model.ground_truth"),
    ({"prompt": "1+1?"}, "no answer in reward_model.ground_truth"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_a_bad_row_is_refused_or_skipped_by_name(tmp_path, bad, message):
    path = write(tmp_path / "a.jsonl", [row(), bad])
    with pytest.raises(ConfigError, match=f"row 2: .*{message}") as error:
        read(path)
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match=f"left out 1 of 2 rows: row 2: .*{message}"):
        assert len(read(path, bad_rows="skip")) == 1


def test_skipped_rows_are_counted_by_cause_in_one_warning(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(), *[row("")] * 7, row(answer="")])
    task = DatasetTask(train=path, bad_rows="skip")
    with pytest.warns(UserWarning, match="left out 8 of 9 rows") as caught:
        task.problems("train")
    (warning,) = caught
    assert str(warning.message).endswith(
        "rows 2, 3, 4, 5, 6 and 2 more: no prompt in prompt (7 rows, such as ''); "
        "row 9: no answer in reward_model.ground_truth ('')"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(task.problems("train")) == 1


def test_duplicate_ids_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(key=1), row(key=1)])
    with pytest.raises(ConfigError, match="row 2: the same key as an earlier row"):
        read(path, id="key")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "question"}, "no column 'question' .prompt.; it has prompt, reward_model"),
        ({"answer": "label.text"}, "no column 'label.text' .answer.; it has prompt, reward_model"),
        ({"solution": "extra_info.solution"}, "no column 'extra_info.solution' .solution."),
        ({"id": "key"}, "no column 'key' .id."),
        ({"answer": "reward_model.truth"}, "no usable row: row 1: no answer in reward_model.truth"),
    ],
)
def test_a_missing_column_is_named_with_the_existing_ones(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        read(write(tmp_path / "a.jsonl", [row()]), **settings)


def test_unreadable_sources_are_refused_in_one_line(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text(json.dumps(row()) + '\n\n{"prompt"\n')
    (tmp_path / "bad.json").write_text('[{"prompt": "a"},\n{"prompt"\n')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "latin.json").write_bytes(b'[{"prompt":\n"caf\xe9"}]')
    (tmp_path / "truncated.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "bad.parquet").write_text("no parquet")
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "missing.parquet": "no file or folder",
        "some/where/else": "no file or folder",
        "empty.jsonl": "has no rows",
        "bad.jsonl": r"1 of 2 rows cannot be used: row 2 .line 3.: not JSON .Expecting",
        "bad.json": "cannot read .*line 3 column 1",
        "deep.json": "cannot read .*recursion",
        "latin.json": "cannot read .*line 2 is not UTF-8",
        "list.jsonl": "row 1: not an object but list",
        "bad.parquet": "cannot read",
        "truncated.parquet": "cannot read",
        "folder.parquet": "holds no .parquet",
        "notes.txt": "must end in one of .parquet, .jsonl, .json, .csv",
        "folder": "holds no .parquet",
    }.items():
        with pytest.raises(ConfigError, match=message) as error:
            read(tmp_path / name)
        assert str(error.value).startswith("train")
        assert "\n" not in str(error.value)
    path = write(tmp_path / "hopeless.jsonl", [row("")])
    with pytest.raises(ConfigError, match="no usable row: row 1: no prompt"):
        read(path, bad_rows="skip")
    with pytest.raises(ConfigError, match=r"set data\.task\.heldout to a file, or data\.benchmarks to {} for"):
        DatasetTask(train=path).problems("heldout")


@pytest.mark.parametrize(
    ("split", "source", "expected"),
    [
        ("train", "owner/name", ("owner/name", None, "train")),
        ("heldout", "owner/name", ("owner/name", None, "test")),
        ("train", "name:dev", ("name", None, "dev")),
        ("heldout", "owner/name:main:dev[:10]", None),
        ("heldout", "owner/name:main:dev", ("owner/name", "main", "dev")),
    ],
)
def test_hub_ids_are_split_into_name_config_and_split(monkeypatch, split, source, expected):
    import datasets

    calls = []

    def load_dataset(name, config, *, split):
        calls.append((name, config, split))
        return [row()]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "check_reachable", lambda *_: None)
    task = DatasetTask(**{split: source})
    if expected is None:
        with pytest.raises(ConfigError, match="no file or folder"):
            task.problems(split)
    else:
        assert len(task.problems(split)) == 1
        assert calls == [expected]


def test_a_data_set_that_cannot_be_loaded_is_refused_in_one_line(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "check_reachable", lambda *_: None)
    with pytest.raises(ConfigError, match=r"owner/name is neither .*: no network$"):
        read("owner/name")


def test_invalid_settings_are_refused_by_name():
    for settings, message in [
        ({}, "train"),
        ({"train": "a", "prompt_template": "x"}, "prompt_template"),
        ({"train": "a", "bad_rows": "ignore"}, "bad_rows"),
    ]:
        with pytest.raises(ConfigError, match=message):
            DatasetTask(**settings)


def test_the_task_pickles_without_its_problems(tmp_path):
    task = DatasetTask(train=write(tmp_path / "a.jsonl", [row()] * 1000))
    assert task.problems("train") is task.problems("train")
    assert len(pickle.dumps(task)) < 2000
    assert len(pickle.loads(pickle.dumps(task)).problems("train")) == 1000


def length_reward(problem: Problem, completion: str) -> float:
    return len(completion) / 10


class Picky:
    """A reward class without a base class of this package."""

    def __init__(self, word: str = "yes") -> None:
        self.word = word

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        return Verdict(1.0, completion == self.word)


@pytest.mark.parametrize(
    ("arguments", "kind", "state"),
    [
        ([], MathReward, {"fallback": True}),
        (["--task.reward=MathReward", "--task.reward.fallback=false"], MathReward, {"fallback": False}),
        (["--task.reward=ExactMatch"], ExactMatch, {"pattern": ""}),
        (["--task.reward=ExactMatch", "--task.reward.pattern=is (.*)"], ExactMatch, {"pattern": "is (.*)"}),
        ([f"--task.reward={__name__}.length_reward"], type(length_reward), {}),
        ([f"--task.reward={__name__}.Picky", "--task.reward.word=no"], Picky, {"word": "no"}),
    ],
)
def test_rewards_are_chosen_on_the_command_line(arguments, kind, state):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Task, "task")
    config = parser.parse_args(["--task=DatasetTask", "--task.train=a.parquet", *arguments])
    assert parser.parse_string(parser.dump(config)) == config
    task = getattr(parser, "instantiate", parser.instantiate_classes)(config).task
    assert type(task.reward) is kind
    assert {name: getattr(task.reward, name) for name in state} == state


def test_the_result_of_a_reward_function_becomes_a_verdict():
    task = DatasetTask(train="a", reward=length_reward)
    assert task.isolated
    assert not DatasetTask(train="a", reward=ExactMatch()).isolated
    assert task.verify(Problem("p", "q"), "four") == Verdict(0.4, False)
    assert task.verify(Problem("p", "q"), "fiver") == Verdict(0.5, True)


# -- patterns ------------------------------------------------------------------------------------------------------


def test_a_prompt_pattern_finds_the_question_in_the_last_user_message_before_the_template_is_applied(tmp_path):
    asked = "Q: old Q: 1+1?\nSay {it}. A:"
    chat = [{"role": "user", "content": "Q: no A:"}, {"role": "assistant", "content": "0"}]
    rows = [row(asked), row([*chat, {"role": "user", "content": asked}])]
    settings = {"prompt_pattern": r"Q:((?:(?!Q:).)*)A:", "prompt_template": "{prompt} In a box."}
    plain, messages = read(write(tmp_path / "a.jsonl", rows), **settings)
    assert plain.prompt == "1+1?\nSay {it}. In a box."
    assert messages.prompt == [*chat, {"role": "user", "content": plain.prompt}]


def test_a_pattern_without_groups_keeps_its_last_match(tmp_path):
    (problem,) = read(write(tmp_path / "a.jsonl", [row("1+1? 2+2?", "so 1, so 2")]), answer_pattern=r"\d")
    assert (problem.prompt, problem.answer) == ("1+1? 2+2?", "2")


@pytest.mark.parametrize(
    ("setting", "prompt", "answer", "cause"),
    [
        ("answer_pattern", "1+1?", "no hashes", "answer_pattern in reward_model.ground_truth finds nothing"),
        ("answer_pattern", "1+1?", "#### ", "answer_pattern in reward_model.ground_truth finds nothing"),
        ("answer_pattern", "1+1?", 7, "because the value is not text but int"),
        ("prompt_pattern", "1+1?", "2", "prompt_pattern in prompt finds nothing"),
        ("prompt_pattern", [{"role": "user", "content": "1+1?"}], "2", "prompt_pattern in prompt finds nothing"),
    ],
)
def test_a_row_in_which_a_pattern_finds_nothing_is_bad(tmp_path, setting, prompt, answer, cause):
    path = write(tmp_path / "a.jsonl", [row("#### a", "#### b"), row(prompt, answer)])
    with pytest.raises(ConfigError, match=rf"1 of 2 rows cannot be used: row 2: .*{cause}"):
        read(path, **{setting: "####(.*)"})
    with pytest.warns(UserWarning, match=cause):
        (problem,) = read(path, **{setting: "####(.*)"}, bad_rows="skip")
    assert (problem.prompt, problem.answer) == (("#### a", "b") if setting == "answer_pattern" else ("a", "#### b"))


@pytest.mark.parametrize("setting", ["prompt_pattern", "answer_pattern"])
def test_an_invalid_pattern_is_refused(setting):
    with pytest.raises(ConfigError, match=rf"{setting} '\(' is not a regular expression"):
        DatasetTask(train="a.jsonl", **{setting: "("})
