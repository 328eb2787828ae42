"""Problems from data files or from a data set of the Hugging Face hub."""

from __future__ import annotations

import csv
import json
import math
import re
import reprlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from rlrt_lightning.errors import ConfigError, first_line
from rlrt_lightning.tasks.base import Messages, Problem, Split, Task, Verdict
from rlrt_lightning.tasks.rewards import MathReward, Reward, RewardFunction, as_verdict

Row = dict[str, Any]

ENDINGS = (".parquet", ".jsonl", ".json", ".csv")
"""The kinds of data files."""

_EXAMPLES = 5  # bad rows that are named for each cause
_EXCERPTS = 3  # their values that are shown
_COLUMNS = 30  # of the data that are named where one is missing


class DatasetTask(Task):
    r"""Problems from data files or from a data set of the Hugging Face hub. verl's files work as they are.

    A source is a file (.parquet, .jsonl, .json, .csv), a folder of such files, which are read in the order of their
    names, or a data set of the hub: `owner/name`, `owner/name:split` or `owner/name:config:split`. Without a split, the
    hub's `train` is read for training and its `test` for the held-out problems.

    A dotted name such as `extra_info.solution` looks into a column that holds a dict, or the text of one in JSON.

    Args:
        train: Source of the training problems.
        heldout: Source of the held-out problems.
        prompt: Column of the question: a text, or a conversation, which is a list of dicts with `role` and `content`
            that ends with the user's message, or such a list as JSON text.
        answer: Column of the ground truth, which goes to the reward.
        solution: Column of a reference solution in words. None: the data has none.
        id: Column of the problem's name, different in every row. None: problems are numbered.
        prompt_template: Text that the last user's message becomes, `{prompt}` standing for the message itself. It is
            the place to ask for an answer in `\boxed{}`; other braces mean nothing.
        reward: What judges a completion: a class with settings, such as `ExactMatch`, or the import path of a function
            `(problem, completion)` that returns a number, a bool or a `Verdict`. None: `MathReward`. The row's other
            columns are in `problem.info`.
        bad_rows: What to do about rows that cannot be used: without a prompt or an answer, of a wrong type, not UTF-8,
            not JSON, or with the name of an earlier row. All are read; then `error` stops and `skip` leaves them out
            and warns, each with a count by cause and the first of them.
    """

    def __init__(
        self,
        train: str | None = None,
        heldout: str | None = None,
        prompt: str = "prompt",
        answer: str = "reward_model.ground_truth",
        solution: str | None = None,
        id: str | None = None,
        prompt_template: str = "{prompt}",
        reward: Reward | RewardFunction | None = None,
        bad_rows: Literal["error", "skip"] = "error",
    ) -> None:
        if train is None and heldout is None:
            raise ConfigError(
                "a DatasetTask needs `train`, `heldout` or both: a data file, a folder or a data set's id"
            )
        if "{prompt}" not in prompt_template:
            raise ConfigError(
                f"prompt_template must hold {{prompt}}, which stands for the question: {prompt_template!r}"
            )
        if bad_rows not in ("error", "skip"):
            raise ConfigError(f"bad_rows must be 'error' or 'skip', not {bad_rows!r}")
        self.train = train
        self.heldout = heldout
        self.prompt = prompt
        self.answer = answer
        self.solution = solution
        self.id = id
        self.prompt_template = prompt_template
        self.reward: Reward | RewardFunction = MathReward() if reward is None else reward
        self.bad_rows = bad_rows
        self.isolated = getattr(self.reward, "isolated", True)
        self._problems: dict[str, list[Problem]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_problems": {}}  # worker processes have no use for the problems

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split, read at the first call."""
        if split not in self._problems:
            self._problems[split] = self._read(split)
        return self._problems[split]

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Asks the reward."""
        return as_verdict(self.reward(problem, completion))

    def warm_up(self) -> None:
        """Warms the reward up."""
        getattr(self.reward, "warm_up", lambda: None)()

    def _read(self, split: Split) -> list[Problem]:
        source = {"train": self.train, "heldout": self.heldout}[split]
        if source is None:
            raise ConfigError(f"the task has no {split} problems: its setting `{split}` is not given")
        rows = _rows(source, split)
        where = f"{split} ({source})"
        if not rows:
            raise ConfigError(f"{where} has no rows")
        self._check_columns([row for _, row in rows if not isinstance(row, _BadRow)], where)
        problems: list[Problem] = []
        seen: dict[str, str] = {}
        bad = _Account()
        for number, (place, row) in enumerate(rows, 1):
            try:
                if isinstance(row, _BadRow):
                    raise row
                problem = self._problem(row, f"{split}-{number}")
                if problem.id in seen:  # roll-outs are grouped by it
                    raise _BadRow(f"the same {self.id} as an earlier row", f"{problem.id!r} of {seen[problem.id]}")
            except _BadRow as error:
                bad.add(place, error)
                continue
            seen[problem.id] = place
            problems.append(problem)
        if not problems:
            raise ConfigError(f"{where} has no usable row: {bad}")
        if bad.count and self.bad_rows == "error":
            raise ConfigError(
                f"{where}: {bad.count} of {len(rows)} rows cannot be used: {bad}; bad_rows=skip leaves such rows out"
            )
        if bad.count:
            warnings.warn(f"{where}: left out {bad.count} of {len(rows)} rows: {bad}", stacklevel=3)
        return problems

    def _check_columns(self, rows: list[Row], where: str) -> None:
        """A column that no row has is a wrong setting, whatever `bad_rows` says."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        shown = ", ".join(_printable(column) for column in columns[:_COLUMNS])
        if len(columns) > _COLUMNS:
            shown += f" and {len(columns) - _COLUMNS} more"
        for setting in ("prompt", "answer", "solution", "id"):
            name = getattr(self, setting)
            if columns and name is not None and name not in columns and name.partition(".")[0] not in columns:
                raise ConfigError(f"{where} has no column {name!r} ({setting}); it has {shown}")

    def _problem(self, row: Row, default_id: str) -> Problem:
        conversation = _conversation(_look_up(row, self.prompt), self.prompt)
        answer = _answer(_look_up(row, self.answer), self.answer)
        solution = None if self.solution is None else _look_up(row, self.solution)
        if self.solution is not None:
            _check_text(solution, self.solution)
        id = default_id if self.id is None else _look_up(row, self.id)
        if _is_empty(id):
            raise _BadRow(f"no name in {self.id}", _excerpt(id))
        if not isinstance(id, (str, int, float, Decimal)):
            raise _BadRow(f"the name in {self.id} is neither text nor a number but {type(id).__name__}", _excerpt(id))
        if self.id is not None:
            _check_text(id, self.id)
        if isinstance(conversation, str):
            prompt: str | Messages = self.prompt_template.replace("{prompt}", conversation)
        else:
            asked = self.prompt_template.replace("{prompt}", conversation[-1]["content"])
            prompt = [*conversation[:-1], {**conversation[-1], "content": asked}]
        return Problem(
            id=str(id),
            prompt=prompt,
            answer=answer,
            solution=str(solution) if solution else None,
            info={name: _decoded(value) for name, value in row.items() if name != self.prompt},
        )


class _BadRow(Exception):
    """A row that makes no problem.

    Args:
        cause: What is wrong, in the same words for each such row.
        example: What shows it, short.
    """

    def __init__(self, cause: str, example: str) -> None:
        super().__init__(cause)
        self.cause = cause
        self.example = example


class _Account:
    """The bad rows of a source, by cause."""

    def __init__(self) -> None:
        self.count = 0
        self._places: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}

    def add(self, place: str, row: _BadRow) -> None:
        """Counts a row."""
        self.count += 1
        self._counts[row.cause] = self._counts.get(row.cause, 0) + 1
        places, examples = self._places.setdefault(row.cause, []), self._examples.setdefault(row.cause, [])
        if len(places) < _EXAMPLES:
            places.append(place)
        if len(examples) < _EXCERPTS and row.example not in examples:
            examples.append(row.example)

    def __str__(self) -> str:
        by_count = sorted(self._counts, key=lambda cause: -self._counts[cause])
        return "; ".join(map(self._of_one_cause, by_count))

    def _of_one_cause(self, cause: str) -> str:
        places, count = self._places[cause], self._counts[cause]
        rows = ", ".join(place.removeprefix("row ") for place in places)
        more = f" and {count - len(places)} more" if count > len(places) else ""
        in_all = f"{count} rows, such as " if count > 1 else ""
        return f"row{'s' if count > 1 else ''} {rows}{more}: {cause} ({in_all}{', '.join(self._examples[cause])})"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 3


def _excerpt(value: Any) -> str:
    """A value as far as it fits a message."""
    if isinstance(value, (bytes, bytearray)):
        value = bytes(value[:60])
    with suppress(Exception):
        return "null" if value is None else _SHORT.repr(value)
    return type(value).__name__


def _printable(text: Any) -> str:
    return str(text)[:100].encode("utf-8", "backslashreplace").decode()


def _check_text(value: Any, name: str) -> None:
    """Refuses what no tokenizer reads: bytes, and text that UTF-8 cannot hold."""
    if isinstance(value, (bytes, bytearray)):
        raise _BadRow(f"bytes in {name} where text belongs", _excerpt(value))
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            near = value[max(error.start - 10, 0) : error.start + 10]
            raise _BadRow(
                f"{name} holds bytes that are not UTF-8, or half of a surrogate pair", _excerpt(near)
            ) from None


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or value == {} or (isinstance(value, float) and not math.isfinite(value))


def _answer(value: Any, name: str) -> Any:
    """A ground truth: text, a number, a list of these that are not all empty, or a dict for a reward of one's own."""
    if _is_empty(value) or (isinstance(value, list) and all(map(_is_empty, value))):
        raise _BadRow(f"no answer in {name}", _excerpt(value))
    if not isinstance(value, (str, int, float, Decimal, list, dict)):
        raise _BadRow(f"the answer in {name} is neither text nor a number but {type(value).__name__}", _excerpt(value))
    for text in value if isinstance(value, list) else [value]:
        _check_text(text, name)
    return value.strip() if isinstance(value, str) else value


def _look_up(row: Row, name: str) -> Any:
    """The value of a column, or of what a dotted name points to; None if it is not there."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        value = _decoded(value)
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def _decoded(value: Any) -> Any:
    """The dict that a text holds in JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with suppress(ValueError, RecursionError):
            decoded = json.loads(value)
            return decoded if isinstance(decoded, dict) else value
    return value


def _conversation(value: Any, name: str) -> str | Messages:
    """A prompt in one of its spellings: text, messages, or messages as JSON text. Any other text is just text."""
    if _is_empty(value):
        raise _BadRow(f"no prompt in {name}", _excerpt(value))
    messages = value
    if isinstance(value, str):
        _check_text(value, name)
        messages = None
        if value.lstrip().startswith("["):
            with suppress(ValueError, RecursionError):
                messages = json.loads(value)
        if not (isinstance(messages, list) and messages and all(_is_message(message) for message in messages)):
            return value
    if not isinstance(messages, list):
        raise _BadRow(
            f"the prompt in {name} is neither text nor a list of messages but {type(value).__name__}", _excerpt(value)
        )
    for message in messages:
        if not (_is_message(message) and isinstance(message["role"], str) and isinstance(message["content"], str)):
            raise _BadRow(
                f"the prompt in {name} holds something else than messages with a role and a content in text",
                _excerpt(message),
            )
        _check_text(message["role"], name)
        _check_text(message["content"], name)
    if messages[-1]["role"] != "user":
        raise _BadRow(f"the prompt in {name} does not end with a message of the user", _excerpt(messages[-1]))
    if not messages[-1]["content"].strip():
        raise _BadRow(f"no prompt in {name}", _excerpt(messages[-1]))
    return messages


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and "role" in value and "content" in value


Placed = list[tuple[str, "Row | _BadRow"]]
"""Rows with where they stand."""


def _rows(source: str, split: Split) -> Placed:
    """Reads a source."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS)
        if not files:
            raise ConfigError(f"{split}: the folder {source} holds no {', '.join(ENDINGS)} file")
        return [
            (f"{place} of {_printable(file.name)}" if len(files) > 1 else place, row)
            for file in files
            for place, row in _rows_of_file(file, split)
        ]
    if path.is_file():
        return _rows_of_file(path, split)
    if path.suffix.lower() in ENDINGS or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(:[^:/]+){0,2}", source):
        raise ConfigError(f"{split}: there is no file or folder {source}")
    return _rows_of_hub(source, split)


def _rows_of_file(path: Path, split: Split) -> Placed:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ConfigError(f"{split}: {path} must end in one of {', '.join(ENDINGS)}")
    read = {".parquet": _parquet_rows, ".jsonl": _json_lines, ".json": _json_rows, ".csv": _csv_rows}[ending]
    try:
        return [(place, row if isinstance(row, (dict, _BadRow)) else _no_object(row)) for place, row in read(path)]
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{split}: cannot read {path}: line {line} is not UTF-8: {error.reason}") from None
    except Exception as error:  # of files that are not what their endings say, pyarrow raises anything
        raise ConfigError(f"{split}: cannot read {path}: {_line(error)}") from None


def _no_object(row: Any) -> _BadRow:
    return _BadRow(f"not an object but {type(row).__name__}", _excerpt(row))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    with path.open("rb") as file:  # from a path, it would take parts of the folders' names for columns
        table = pyarrow.parquet.read_table(file)
    if repeated := sorted({name for name in table.column_names if table.column_names.count(name) > 1}):
        raise ValueError(f"it has several columns {_printable(repeated[0])}")
    rows: Iterable[Any]
    try:
        rows = table.to_pylist()
    except Exception:  # a value that Python cannot hold: which one?
        rows = (_parquet_row(table, i) for i in range(table.num_rows))
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _parquet_row(table: Any, i: int) -> Row | _BadRow:
    try:
        return table.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return _BadRow("text that is not UTF-8", _excerpt(error.object[max(error.start - 10, 0) : error.start + 10]))
    except Exception as error:
        return _BadRow("a value that Python cannot hold", _line(error))


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of rows, one row, or lines as in .jsonl."""
    text = path.read_bytes().decode("utf-8-sig")
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        if text.lstrip().startswith("["):
            raise
        return _json_lines(path)
    return ((f"row {number}", row) for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1))


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    with path.open("rb") as file:
        for line_number, line in enumerate(file, 1):  # bytes: text would be split at characters that JSON may hold
            line = line.strip()
            if not line:
                continue
            number += 1
            place = f"row {number}" if number == line_number else f"row {number} (line {line_number})"
            try:
                yield place, json.loads(line.decode("utf-8-sig" if line_number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                near = line[max(error.start - 10, 0) : error.start + 10]
                yield place, _BadRow("text that is not UTF-8", _excerpt(near))
            except json.JSONDecodeError as error:
                yield place, _BadRow("not JSON", f"{error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits; lists in lists in lists
                yield place, _BadRow("not JSON", _line(error))


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # Bytes that are not UTF-8 become surrogates here, and their rows are refused.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file, _csv_cells_of_any_size():
        reader = csv.DictReader(file)
        number = 0
        while True:
            number += 1
            row: Any
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                row = _BadRow("not CSV", f"line {reader.line_num}: {_line(error)}")
            if isinstance(row, dict) and None in row:
                row = _BadRow("more cells than the first line names", _excerpt(row[None]))
            yield f"row {number}", row


@contextmanager
def _csv_cells_of_any_size() -> Iterator[None]:
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _rows_of_hub(source: str, split: Split) -> Placed:
    import datasets

    name, *rest = source.split(":")
    part = rest[-1] if rest else {"train": "train", "heldout": "test"}[split]
    config = rest[0] if len(rest) == 2 else None
    try:
        rows: list[Any] = list(datasets.load_dataset(name, config, split=part))
    except Exception as error:
        raise ConfigError(
            f"{split}: {source} is neither a file or folder here nor a data set that can be loaded: {_line(error)}"
        ) from None
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _line(error: BaseException) -> str:
    return _printable(first_line(error)) or type(error).__name__
