"""Problems from data files or from a dataset on the Hugging Face Hub."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any, Literal

from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.tasks.base import Messages, Problem, Split, Task, Verdict
from rlrt_lightning.tasks.columns import (
    check_text,
    conversation,
    decoded,
    extracted,
    ground_truth,
    is_empty,
    look_up,
    solution,
)
from rlrt_lightning.tasks.patterns import compiled
from rlrt_lightning.tasks.readers import BadRow, BadRows, Row, excerpt, printable, read_rows
from rlrt_lightning.tasks.rewards import MathReward, Reward, RewardFunction, WeightedRewards, as_verdict

_MAX_COLUMNS = 30  # listed in the message about a missing column


class DatasetTask(Task):
    r"""Problems from data files or from a dataset on the Hugging Face Hub. verl's files work without changes.

    A source is a file (.parquet, .jsonl, .json, .csv), a folder of such files, which are read in the order of their
    names, or a Hub dataset: `owner/name`, `owner/name:split` or `owner/name:config:split`. Without a split, the
    dataset's `train` split is used for training and its `test` split for the held-out problems.

    A dotted name such as `extra_info.solution` selects a key of a column that holds a dict, or a dict stored as text.

    Args:
        train: Source of the training problems.
        heldout: Source of the held-out problems.
        prompt: Column of the question: a string, or a conversation that ends with a user message. A conversation is a
            list of dicts, or one dict, with `role` and `content` or ShareGPT's `from` and `value`; it may be stored as
            text, in JSON or as a Python literal.
        answer: Column of the ground truth that the reward compares with: a string, a number, or a list of these, any
            of which is correct. If it is a dict, `MathReward` and `ExactMatch` use its `ground_truth`.
        solution: Column of a reference solution: a string, a list of strings, of which the first is used, or a
            conversation, of which the last assistant message is used. None: the data has no solutions.
        id: Column of the problem's name, unique in every row. None: problems are numbered.
        prompt_pattern: Regular expression that finds the question in the last user message, to drop other text, such
            as instructions on the answer's format that do not suit the reward; `prompt_template` can add new ones. The
            last match is used, or the first group of that match if the pattern has groups. None: the whole message.
        answer_pattern: Regular expression that finds the ground truth in its column, as `prompt_pattern` does for the
            question: `####(.*)` in GSM8K, where the column holds a solution that ends with the answer. None: the whole
            column.
        prompt_template: Template for the last user message, in which `{prompt}` is replaced by the original message;
            for example, it can ask for an answer in `\boxed{}`. Other braces are left unchanged.
        reward: Judges completions: a class with settings, such as `ExactMatch`, or the import path of a function
            `(problem, completion)` that returns a number, a bool or a `Verdict`. None: `MathReward`. The row's other
            columns are available in `problem.info`. Several rewards by name, {math: MathReward, format: my.format}, are
            added up, and the mean of each is logged as `rewards/<name>`.
        reward_weights: Weights of several rewards by name, {format: 0.1}; the others have 1. Methods compare the sum
            with their `success_threshold`.
        correct_by: Name of the one of several rewards that decides whether a completion is correct, which avg@k, pass@k
            and `groups/all_correct` count, and that reads the ground truth. None: the first.
        bad_rows: How to handle unusable rows: those without a prompt or an answer, with a wrong type, not UTF-8, not
            JSON, with a repeated key, in which a pattern finds nothing, or with the name of an earlier row. All rows
            are read first; then `error` stops the run and `skip` drops the bad rows with a warning. Both report a count
            and the first rows of each cause.
    """

    def __init__(
        self,
        train: str | None = None,
        heldout: str | None = None,
        prompt: str = "prompt",
        answer: str = "reward_model.ground_truth",
        solution: str | None = None,
        id: str | None = None,
        prompt_pattern: str | None = None,
        answer_pattern: str | None = None,
        prompt_template: str = "{prompt}",
        reward: Reward | RewardFunction | dict[str, Reward | RewardFunction] | None = None,
        bad_rows: Literal["error", "skip"] = "error",
        reward_weights: dict[str, float] | None = None,
        correct_by: str | None = None,
    ) -> None:
        if train is None and heldout is None:
            raise ConfigError(
                "DatasetTask needs `train`, `heldout` or both: set it to a data file, a folder or a dataset's name"
            )
        if "{prompt}" not in prompt_template:
            raise ConfigError(
                f"prompt_template must contain {{prompt}}, the placeholder of the question: {prompt_template!r}"
            )
        if bad_rows not in ("error", "skip"):
            raise ConfigError(f"bad_rows must be 'error' or 'skip', not {bad_rows!r}")
        self.train = train
        self.heldout = heldout
        self.prompt = prompt
        self.answer = answer
        self.solution = solution
        self.id = id
        self.prompt_pattern = prompt_pattern
        self.answer_pattern = answer_pattern
        self._prompt_finder = None if prompt_pattern is None else compiled(prompt_pattern, "prompt_pattern")
        self._answer_finder = None if answer_pattern is None else compiled(answer_pattern, "answer_pattern")
        self.prompt_template = prompt_template
        self.reward = MathReward() if reward is None else reward
        self.reward_weights = reward_weights
        self.correct_by = correct_by
        self._judge = self._combined()
        self.bad_rows = bad_rows
        self.isolated = getattr(self._judge, "isolated", True)
        self._problems: dict[str, list[Problem]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_problems": {}}  # worker processes do not need the problems

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split, read on the first call."""
        if split not in self._problems:
            self._problems[split] = self._read(split)
        return self._problems[split]

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Judges one completion with the reward."""
        return as_verdict(self._judge(problem, completion))

    def warm_up(self) -> None:
        """Warms the reward up."""
        getattr(self._judge, "warm_up", lambda: None)()

    def _combined(self) -> Reward | RewardFunction:
        """The reward, or the weighted sum of several."""
        if isinstance(self.reward, dict):
            return WeightedRewards(self.reward, self.reward_weights, self.correct_by)
        for name in ("reward_weights", "correct_by"):
            if getattr(self, name):
                raise ConfigError(f"{name} is set, but there is only one reward; give several by name, or remove it")
        return self.reward

    def _read(self, split: Split) -> list[Problem]:
        source = {"train": self.train, "heldout": self.heldout}[split]
        if source is None:
            unneeded = ", or data.benchmarks to {} for a run without evaluation" if split == "heldout" else ""
            raise ConfigError(f"data.task: there are no {split} problems; set data.task.{split} to a file{unneeded}")
        rows = read_rows(source, split)
        where = f"{split} ({source})"
        if not rows:
            raise ConfigError(f"{where} has no rows")
        self._check_columns([row for _, row in rows if not isinstance(row, BadRow)], where)
        problems: list[Problem] = []
        seen: dict[str, str] = {}
        bad = BadRows()
        for number, (place, row) in enumerate(rows, 1):
            try:
                if isinstance(row, BadRow):
                    raise row
                problem = self._problem(row, f"{split}-{number}")
                if problem.id in seen:  # rollouts are grouped by it
                    raise BadRow(f"the same {self.id} as an earlier row", f"{problem.id!r} of {seen[problem.id]}")
            except BadRow as error:
                bad.add(place, error)
                continue
            seen[problem.id] = place
            problems.append(problem)
        if not problems:
            raise ConfigError(f"{where} has no usable row: {bad}")
        if bad.count and self.bad_rows == "error":
            raise ConfigError(
                f"{where}: {bad.count} of {len(rows)} rows cannot be used: {bad}; fix them, or set bad_rows=skip"
            )
        if bad.count:
            warnings.warn(f"{where}: left out {bad.count} of {len(rows)} rows: {bad}", stacklevel=3)
        return problems

    def _check_columns(self, rows: list[Row], where: str) -> None:
        """Refuses a column that no row has, regardless of `bad_rows`, since it is a wrong setting."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        shown = ", ".join(printable(column) for column in columns[:_MAX_COLUMNS])
        if len(columns) > _MAX_COLUMNS:
            shown += f" and {len(columns) - _MAX_COLUMNS} more"
        for setting in ("prompt", "answer", "solution", "id"):
            name = getattr(self, setting)
            if columns and name is not None and name not in columns and name.partition(".")[0] not in columns:
                raise ConfigError(f"{where} has no column {name!r} ({setting}); it has {shown}")

    def _problem(self, row: Row, default_id: str) -> Problem:
        prompt = conversation(look_up(row, self.prompt), self.prompt)
        truth = look_up(row, self.answer)
        if self._answer_finder is not None and not is_empty(truth):
            truth = extracted(self._answer_finder, truth, f"answer_pattern in {self.answer}")
        answer = ground_truth(truth, self.answer, getattr(self._judge, "deciding", self._judge))
        return Problem(
            id=default_id if self.id is None else _name(look_up(row, self.id), self.id),
            prompt=self._apply_template(prompt),
            answer=answer,
            solution=None if self.solution is None else solution(look_up(row, self.solution), self.solution),
            info={name: _decode_leniently(value) for name, value in row.items() if name != self.prompt},
        )

    def _apply_template(self, prompt: str | Messages) -> str | Messages:
        """Applies pattern and template to a prompt's last message."""
        if isinstance(prompt, str):
            return self._rewritten(prompt)
        return [*prompt[:-1], {**prompt[-1], "content": self._rewritten(prompt[-1]["content"])}]

    def _rewritten(self, question: str) -> str:
        if self._prompt_finder is not None:
            question = extracted(self._prompt_finder, question, f"prompt_pattern in {self.prompt}")
        return self.prompt_template.replace("{prompt}", question)


def _name(value: Any, column: str) -> str:
    """The name of a problem as a string."""
    if is_empty(value):
        raise BadRow(f"no name in {column}", excerpt(value))
    if not isinstance(value, (str, int, float, Decimal)):
        raise BadRow(f"the name in {column} is neither text nor a number but {type(value).__name__}", excerpt(value))
    check_text(value, column)
    return str(value)


def _decode_leniently(value: Any) -> Any:
    """Like `decoded`, but keeps the text of a dict with a repeated key, since nothing may need its values."""
    with suppress(BadRow):
        return decoded(value)
    return value
