"""Faulty rows are reported at the start by cause, with counts and the first rows, and never as a stack trace."""

from __future__ import annotations

import csv
import datetime
import json
import random
import re
import warnings
from collections import Counter
from contextlib import suppress
from decimal import Decimal

import pytest
from lightning import Trainer

from rlrt_lightning import Policy, RLRTModule, RolloutDataModule, Sampling, Teacher
from rlrt_lightning.__main__ import main
from rlrt_lightning.datamodule import Benchmark
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.tasks import DatasetTask, ExactMatch, Problem
from rlrt_lightning.tasks.base import Task
from tests.helpers.epochs import fit_and_record

NO_PROMPT = "no prompt in prompt"
NO_ANSWER = "no answer in answer"
NO_MESSAGES = "the prompt in prompt has items that are not messages with a role and text content"
BROKEN = "holds bytes that are not UTF-8, or half of a surrogate pair"
TWICE = "the same id as an earlier row"
USER = {"role": "user", "content": "1+1?"}


def flaws(i):
    """Changes to a good row that break it in one way each, with the cause to be named."""
    return [
        *[({"prompt": p}, NO_PROMPT) for p in (None, "", " \n", [], {}, [{"role": "user", "content": ""}])],
        *[
            ({"prompt": p}, f"the prompt in prompt is neither text nor a list of messages but {type(p).__name__}")
            for p in (7, 0.5, True, {"role": "user"})
        ],
        *[
            ({"prompt": p}, NO_MESSAGES)
            for p in (
                ["1+1?"],
                [USER, None],
                [{"role": "user"}],
                [{"role": "user", "content": None}],
                [{"role": 5, "content": "1+1?"}],
                [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}],
            )
        ],
        (
            {"prompt": [USER, {"role": "assistant", "content": "2"}]},
            "the prompt in prompt does not end with a user message",
        ),
        *[({"answer": a}, NO_ANSWER) for a in (None, "", "\t", [], {}, [None], float("nan"), float("inf"))],
        *[({"prompt": f"half a pair {half}"}, f"prompt {BROKEN}") for half in ("\ud800", "\udfff", "\ud83d")],
        ({"prompt": [{"role": "user", "content": "\udc00"}]}, f"prompt {BROKEN}"),
        ({"answer": "\ud800"}, f"answer {BROKEN}"),
        ({"answer": ["5", "\ud800"]}, f"answer {BROKEN}"),
        ({"id": f"\ud800{i}"}, f"id {BROKEN}"),
        *[({"id": name}, "no name in id") for name in (None, "", [])],
        ({"id": [1]}, "the name in id is neither text nor a number but list"),
        *[({"id": name}, TWICE) for name in ("first", 1, "1", "1 "[:1])],
    ]


RAW = [  # whole lines of a JSONL file
    *[(line, "not JSON") for line in (b"{", b'{"prompt": "1+1?", "answer"', b"prompt,answer", b"\x00", b"'a'")],
    (b'{"prompt": "1+1?", "answer": ' + b"7" * 10_000 + b"}", "not JSON"),
    (b'{"prompt": ' + b"[" * 200_000, "not JSON"),
    (b'{"prompt": "caf\xe9", "answer": "5"}', "text that is not UTF-8"),
    (b'{"prompt": "1+1?", "answer": "\xff\xfe"}', "text that is not UTF-8"),
    (b'{"prompt": "\xf0\x9f\x98"}', "text that is not UTF-8"),
    (b"[1, 2]", "not an object but list"),
    (b"5", "not an object but int"),
    (b"null", "not an object but NoneType"),
]


def faulty(count, seed=0):
    """Lines of a JSONL file, seven in eight of them faulty, with the causes; the first two are good."""
    rng = random.Random(f"bad-data/{seed}")
    good = {"prompt": "1+1?", "answer": "2"}
    lines = [(json.dumps({**good, "id": name}).encode(), None) for name in ("first", "1")]
    for i in range(count):
        if i % 8 == 0:
            lines.append((json.dumps({**good, "id": f"good-{i}"}).encode(), None))
        elif rng.random() < 0.3:
            lines.append(rng.choice(RAW))
        else:
            change, cause = rng.choice(flaws(i))
            lines.append((json.dumps({**good, "id": f"bad-{i}", **change}).encode(), cause))
    return lines


COLUMNS = {"prompt": "prompt", "answer": "answer", "id": "id", "reward": ExactMatch()}


def report_of(path, bad_rows, **settings):
    """The error or warning about a file, and its problems."""
    task = DatasetTask(train=str(path), bad_rows=bad_rows, **{**COLUMNS, **settings})
    if bad_rows == "error":
        with pytest.raises(ConfigError) as error:
            task.problems("train")
        return str(error.value), None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        problems = task.problems("train")
    (warning,) = caught
    return str(warning.message), problems


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_two_thousand_faulty_rows_are_counted_by_cause(tmp_path, bad_rows):
    lines = faulty(2_300)
    path = tmp_path / "faulty.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in lines))
    causes = Counter(cause for _, cause in lines if cause)
    assert sum(causes.values()) > 2_000
    assert len(causes) >= 17
    text, problems = report_of(path, bad_rows)
    assert f"{sum(causes.values())} of {len(lines)} rows" in text
    for cause, count in causes.items():
        first = [i for i, (_, c) in enumerate(lines, 1) if c == cause][:5]
        assert re.search(f"rows {', '.join(map(str, first))} and {count - 5} more: {re.escape(cause)}", text), cause
        assert f"({count} rows, such as " in text
    assert len(text) < 6_000
    assert text.isascii()
    assert text.isprintable()
    if problems is not None:
        names = [json.loads(line)["id"] for line, cause in lines if not cause]
        assert [problem.id for problem in problems] == names


def test_the_report_shows_the_faulty_values(tmp_path):
    path = tmp_path / "faulty.jsonl"
    rows = [
        {"answer": "2"},
        {"answer": None, "prompt": "1"},
        {"answer": "2", "prompt": 7},
        {"answer": "2", "prompt": "1"},
    ]
    path.write_text("".join(json.dumps({"id": i % 3, **row}) + "\n" for i, row in enumerate(rows)) + '{"a": \n')
    text, _ = report_of(path, "error")
    for part in (
        "row 1: no prompt in prompt (null)",
        "row 2: no answer in answer (null)",
        "row 3: the prompt in prompt is neither text nor a list of messages but int (7)",
        "row 5: not JSON (Expecting value at column 6)",
    ):
        assert part in text
    text, _ = report_of(path, "error", prompt="answer")
    assert "no name in id" not in text
    assert "row 4: the same id as an earlier row ('0' of row 1)" in text


def test_csv_rows_with_invalid_utf8_or_extra_cells_are_skipped(tmp_path):
    path = tmp_path / "a.csv"
    lines = [
        b"prompt,answer,id",
        b"1+1?,2,a",
        b"caf\xe9,2,b",
        b"1+1?,2,c,d",
        b"1+1?",
        b",2,e",
        b'"' + b"x" * 200_000 + b'",2,f',
    ]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    before = csv.field_size_limit()
    text, problems = report_of(path, "skip")
    assert csv.field_size_limit() == before
    assert [problem.id for problem in problems] == ["a", "f"]
    assert "row 2: prompt holds bytes that are not UTF-8, or half of a surrogate pair ('caf\\udce9')" in text
    assert "row 3: more cells than the first line names (['d'])" in text
    assert "row 4: no answer in answer (null)" in text
    assert "row 5: no prompt in prompt ('')" in text


def test_parquet_columns_of_unsupported_types_are_reported(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(
        {
            "prompt": ["1+1?"] * 4,
            "bytes": [b"1+1?"] * 4,
            "day": [datetime.date(2026, 1, 1)] * 4,
            "price": [Decimal("2.50")] * 4,
            "empty": pyarrow.nulls(4),
            "far": pyarrow.array([0, 2**60, 0, 0], pyarrow.timestamp("ms")),
            "latin": pyarrow.array([b"ok", b"caf\xe9", b"ok", b"ok"]).view(pyarrow.string()),
        }
    )

    def error_of(*columns, **settings):
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(table.select(columns), path)
        return report_of(path, "error", id=None, **settings)[0]

    assert "the answer in day is neither text nor a number but date (4 rows" in error_of("prompt", "day", answer="day")
    assert "the answer in bytes is neither text nor a number but bytes (4 rows, such as b'1+1?')" in error_of(
        "prompt", "bytes", answer="bytes"
    )
    assert "list of messages but bytes" in error_of("bytes", "price", prompt="bytes", answer="price")
    assert "no usable row: rows 1, 2, 3, 4: no answer in empty (4 rows, such as null)" in error_of(
        "prompt", "empty", answer="empty"
    )
    assert "1 of 4 rows cannot be used: row 2: a value that cannot be converted to Python" in error_of(
        "prompt", "price", "far", answer="price"
    )
    assert "1 of 4 rows cannot be used: row 2: text that is not UTF-8 (b'caf\\xe9')" in error_of(
        "prompt", "latin", answer="latin"
    )


def test_damaged_files_raise_only_config_errors(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": f"{i}+1?", "answer": str(i + 1), "id": f"{i}"} for i in range(50)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    whole = {
        ".parquet": (tmp_path / "a.parquet").read_bytes(),
        ".json": json.dumps(rows, indent=1).encode(),
        ".jsonl": b"\n".join(json.dumps(row).encode() for row in rows),
        ".csv": b"prompt,answer,id\n" + b"\n".join(",".join(row.values()).encode() for row in rows),
    }
    rng = random.Random("damaged")
    for ending, content in whole.items():
        for _ in range(30):
            damaged = bytearray(content[: rng.randrange(1, len(content))])
            for _ in range(rng.choice([0, 1, 20]) if ending != ".parquet" else 0):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            path = tmp_path / f"damaged{ending}"
            path.write_bytes(bytes(damaged))
            with warnings.catch_warnings(), suppress(ConfigError):  # and no other error
                warnings.simplefilter("ignore")
                assert DatasetTask(train=str(path), bad_rows="skip", **COLUMNS).problems("train")


def test_a_huge_prompt_is_counted_without_being_tokenized(tmp_path):
    path = tmp_path / "a.jsonl"
    prompts = ["a1b2"] * 5 + ["a1" * 15_000_000, "a1" * 100]
    path.write_text("".join(json.dumps({"prompt": p, "answer": "2", "id": i}) + "\n" for i, p in enumerate(prompts)))
    task = DatasetTask(train=str(path), **COLUMNS)
    with pytest.warns(
        UserWarning, match=r"is 60: 2 of 7 prompts of data.task are longer \(problem 5: .*problem 6: its pr"
    ):
        recorder, _ = fit_and_record(tmp_path, task, epochs=2, max_prompt_tokens=60)
    assert {p.prompt for epoch in recorder.epochs for p in epoch.problems} == {"a1b2"}


@pytest.mark.parametrize("action", ["drop", "error"])
def test_overlong_evaluation_prompts_are_counted_or_refused(tmp_path, action):
    path = tmp_path / "a.jsonl"
    prompts = ["a1b2c3d0", "a1" * 65, "a1b2c3d1"]
    path.write_text("".join(json.dumps({"prompt": p, "answer": "2", "id": i}) + "\n" for i, p in enumerate(prompts)))
    benchmark = Benchmark(DatasetTask(heldout=str(path), **COLUMNS), samples=2, sampling=Sampling(max_new_tokens=4))
    data = RolloutDataModule(benchmarks={"x": benchmark}, overlong_prompts=action)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path)
    message = r"the model.s maximum prompt length is 127: 1 of 3 prompts of data.benchmarks.x are longer \(problem 1: "
    with pytest.raises(ConfigError, match=message) if action == "error" else pytest.warns(UserWarning, match=message):
        trainer.validate(RLRTModule(Policy(), Teacher()), datamodule=data, verbose=False)


def test_data_is_never_executed(tmp_path):
    trace = tmp_path / "trace"
    acts = [
        f"__import__('os').system('touch {trace}')",
        f"open('{trace}', 'w')",
        f"!!python/object/apply:open ['{trace}', w]",
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": act, "answer": act, "id": act}) + "\n" for act in acts))
    task = DatasetTask(train=str(path), prompt="prompt", answer="answer", id="id")
    for problem in task.problems("train"):
        assert task.verify(problem, rf"\boxed{{{problem.answer}}}").correct
        assert not task.verify(problem, rf"\boxed{{{problem.answer} + 1}}").correct
    assert not trace.exists()


@pytest.mark.parametrize(
    ("bad_rows", "message"), [("error", "of 102 rows cannot be used"), ("skip", "has no usable row")]
)
def test_the_command_line_reports_faulty_data_in_one_line(tmp_path, capfd, bad_rows, message):
    lines = faulty(100)
    if bad_rows == "skip":
        lines = [(line, cause) for line, cause in lines if cause not in (None, TWICE)]
    path = tmp_path / "faulty.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in lines))
    columns = [f"--data.task.{column}={column}" for column in ("prompt", "answer", "id")]
    source = [f"--data.task.train={path}", f"--data.task.bad_rows={bad_rows}"]
    folder = [f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false", "--trainer.max_epochs=1"]
    assert main(["fit", "--data.task=DatasetTask", *columns, *source, *folder]) == 2
    err = capfd.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert message in line
    assert "not JSON" in line
    assert "Traceback" not in err


class Broken(Task):
    """Fails to return its problems."""

    def __init__(self, how):
        self.how = how

    def problems(self, split):
        if self.how == "raise":
            raise KeyError("no such file\nat all")
        return {
            "none": None,
            "dicts": [{"prompt": "a1"}],
            "no prompt": [Problem("p", None)],
            "surrogate": [Problem("p", "\ud800")],
        }[self.how]

    def verify(self, problem, completion):
        raise AssertionError


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "raise",
            r"data.task: Broken.problems\('train'\) failed: KeyError: .*no such file.*test_bad_data.py, line \d+",
        ),
        ("none", r"data.task: Broken.problems\('train'\) failed: TypeError"),
        ("dicts", r"not a Problem with a prompt of text or messages: {'prompt': 'a1'}"),
        ("no prompt", r"failed: TypeError"),
        ("surrogate", r"problem p: its prompt cannot be tokenized"),
    ],
)
def test_a_task_that_fails_to_load_its_problems_is_named(tmp_path, how, message):
    with pytest.raises(ConfigError, match=message) as error:
        fit_and_record(tmp_path, Broken(how))
    assert "\n" not in str(error.value)


def test_a_conversation_that_the_chat_template_refuses_is_named(tmp_path):
    class Strict(Policy):
        def encode_prompt(self, prompt, *more):
            if isinstance(prompt, list) and prompt[0]["role"] == "user":
                raise RuntimeError("Conversation roles must alternate")
            return super().encode_prompt(prompt, *more)

    path = tmp_path / "a.jsonl"
    rows = [{"prompt": [{"role": "system", "content": "a1"}, USER], "answer": "2"}] * 3 + [
        {"prompt": [USER], "answer": "2"}
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = DatasetTask(train=str(path), **{**COLUMNS, "id": None})
    with pytest.raises(
        ConfigError, match="problem train-4: its prompt cannot be tokenized: RuntimeError: Conversation"
    ):
        fit_and_record(tmp_path, task, policy=Strict())
