"""Problems from data files or from a data set of the Hugging Face hub."""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from rlrt_lightning.errors import ConfigError
from rlrt_lightning.tasks.base import Messages, Problem, Split, Task, Verdict
from rlrt_lightning.tasks.rewards import MathReward, Reward, RewardFunction, as_verdict

Row = dict[str, Any]

ENDINGS = (".parquet", ".jsonl", ".json", ".csv")
"""The kinds of data files."""

_EXAMPLES = 5  # bad rows that a warning names for each cause


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
        bad_rows: What to do about a row without a usable prompt or without an answer: `error` stops, `skip` leaves it
            out and warns.
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
        self._check_columns(rows, where)
        problems: list[Problem] = []
        seen: set[str] = set()
        bad: dict[str, list[int]] = {}
        for number, row in enumerate(rows, 1):
            try:
                problem = self._problem(row, f"{split}-{number}")
                if problem.id in seen:  # roll-outs are grouped by it
                    raise _BadRow(f"the same {self.id} as an earlier row")
            except _BadRow as error:
                if self.bad_rows == "error":
                    raise ConfigError(f"{where}, row {number}: {error}; bad_rows=skip leaves such rows out") from None
                bad.setdefault(str(error), []).append(number)
                continue
            seen.add(problem.id)
            problems.append(problem)
        if bad:
            causes = "; ".join(f"{_some(numbers)} {cause}" for cause, numbers in bad.items())
            text = f"{where}: left out {sum(map(len, bad.values()))} of {len(rows)} rows: {causes}"
            if not problems:
                raise ConfigError(f"{where} has no usable row: {causes}")
            warnings.warn(text, stacklevel=3)
        return problems

    def _check_columns(self, rows: list[Row], where: str) -> None:
        """A column that no row has is a wrong setting, whatever `bad_rows` says."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        for setting in ("prompt", "answer", "solution", "id"):
            name = getattr(self, setting)
            if name is not None and name not in columns and name.partition(".")[0] not in columns:
                raise ConfigError(f"{where} has no column {name!r} ({setting}); it has {', '.join(columns)}")

    def _problem(self, row: Row, default_id: str) -> Problem:
        conversation = _conversation(_look_up(row, self.prompt), self.prompt)
        answer = _look_up(row, self.answer)
        if isinstance(answer, str):
            answer = answer.strip()
        if answer is None or answer in ("", [], {}) or _is_nan(answer):
            raise _BadRow(f"no answer in {self.answer}")
        solution = None if self.solution is None else _look_up(row, self.solution)
        id = default_id if self.id is None else _look_up(row, self.id)
        if id is None:
            raise _BadRow(f"no name in {self.id}")
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
    """A row that makes no problem."""


def _some(numbers: list[int]) -> str:
    """The first of some row numbers, in words."""
    more = f" and {len(numbers) - _EXAMPLES} more" if len(numbers) > _EXAMPLES else ""
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_EXAMPLES]))}{more}:"


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and value != value


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
        try:
            decoded = json.loads(value)
        except ValueError:
            return value
        return decoded if isinstance(decoded, dict) else value
    return value


def _conversation(value: Any, name: str) -> str | Messages:
    """A prompt in one of its spellings: text, messages, or messages as JSON text. Any other text is just text."""
    messages = value
    if isinstance(value, str):
        if not value.strip():
            raise _BadRow(f"no prompt in {name}")
        messages = None
        if value.lstrip().startswith("["):
            with suppress(ValueError, RecursionError):
                messages = json.loads(value)
        if not (isinstance(messages, list) and messages and all(_is_message(message) for message in messages)):
            return value
    if value is None or _is_nan(value):
        raise _BadRow(f"no prompt in {name}")
    if not isinstance(messages, list):
        raise _BadRow(f"the prompt in {name} is neither text nor a list of messages but {type(value).__name__}")
    if not messages:
        raise _BadRow(f"no prompt in {name}")
    if not all(_is_message(message) and isinstance(message["content"], str) for message in messages):
        raise _BadRow(f"the prompt in {name} holds something else than messages with a role and a content in text")
    if messages[-1]["role"] != "user":
        raise _BadRow(f"the prompt in {name} does not end with a message of the user")
    if not messages[-1]["content"].strip():
        raise _BadRow(f"no prompt in {name}")
    return messages


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and "role" in value and "content" in value


def _rows(source: str, split: Split) -> list[Row]:
    """Reads a source."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS)
        if not files:
            raise ConfigError(f"{split}: the folder {source} holds no {', '.join(ENDINGS)} file")
        return [row for file in files for row in _rows_of_file(file, split)]
    if path.is_file():
        return _rows_of_file(path, split)
    if path.suffix.lower() in ENDINGS or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(:[^:/]+){0,2}", source):
        raise ConfigError(f"{split}: there is no file or folder {source}")
    return _rows_of_hub(source, split)


def _rows_of_file(path: Path, split: Split) -> list[Row]:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ConfigError(f"{split}: {path} must end in one of {', '.join(ENDINGS)}")
    try:
        if ending == ".parquet":
            import pyarrow.parquet

            with path.open("rb") as file:  # from a path, it would take parts of the folders' names for columns
                return pyarrow.parquet.read_table(file).to_pylist()
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file)) if ending == ".csv" else _json_rows(file.read(), ending)
    except (OSError, ValueError, csv.Error) as error:  # what pyarrow raises and bad JSON are ValueErrors
        raise ConfigError(f"{split}: cannot read {path}: {_line(error)}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ConfigError(f"{split}: {path}, row {number} is not an object but {type(row).__name__}")
    return rows


def _json_rows(text: str, ending: str) -> list[Any]:
    if ending == ".json" and text.lstrip().startswith("["):
        return json.loads(text)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines, which splits at characters JSON may hold
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from None
    return rows


def _rows_of_hub(source: str, split: Split) -> list[Row]:
    import datasets

    name, *rest = source.split(":")
    part = rest[-1] if rest else {"train": "train", "heldout": "test"}[split]
    config = rest[0] if len(rest) == 2 else None
    try:
        rows: Iterable[Any] = datasets.load_dataset(name, config, split=part)
    except Exception as error:
        raise ConfigError(
            f"{split}: {source} is neither a file or folder here nor a data set that can be loaded: {_line(error)}"
        ) from None
    return list(rows)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
