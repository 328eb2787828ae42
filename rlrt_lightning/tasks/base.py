"""What a task is: problems to solve, and a program that checks completions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from rlrt_lightning.tasks.answers import readable

Messages = list[dict[str, str]]
"""A conversation: dicts with the keys `role` and `content`, as chat templates take it."""

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Problem:
    """One problem that the policy is asked to solve.

    Args:
        id: Name of the problem, unique within its task.
        prompt: What the policy is asked: plain text, or a conversation that ends with a user's message.
        answer: The ground truth, in whatever form the task's `verify` wants it.
        solution: A reference solution in words, where the data has one.
        info: Anything else that the row holds.
    """

    id: str
    prompt: str | Messages
    answer: Any = None
    solution: str | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """The prompt as text: all of it, or the last message of a conversation."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]

    @property
    def answer_text(self) -> str | None:
        """The ground truth in words, "5 or 7" where several answers are right; None if there is none."""
        return readable(self.answer)


@dataclass(frozen=True)
class Verdict:
    """What the verifier says of one completion.

    Args:
        reward: The reward r, usually 0 or 1.
        correct: Whether the completion solves the problem; avg@k and pass@k count this.
        answer: The answer that was found in the completion, as text.
        message: Why it was judged so, for the sample tables.
        label: A name for the kind of completion (its strategy, its language, ...). The share of each label is logged.
        fault: True where the verifier itself failed (it raised, hung or died); the completion then counts as wrong.
    """

    reward: float
    correct: bool
    answer: str | None = None
    message: str = ""
    label: str | None = None
    fault: bool = False


class Task(ABC):
    """Problems and their verifier. Subclass it for data that no task here reads.

    A task is pickled into the verifier's worker processes, so it holds settings and plain data only.
    """

    isolated: bool = True
    """Whether `verify` runs in worker processes with a time limit. Turn it off only for code that is quick and trusted
    whatever the completion says."""

    @abstractmethod
    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split: a sequence that may make its items on demand, the same ones at each call.

        Raises:
            ConfigError: If the split's data is missing or unusable.
        """

    @abstractmethod
    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Judges one completion (`Rollout.text`). What it raises becomes a `fault` verdict."""

    def warm_up(self) -> None:  # noqa: B027 - there is nothing to do unless a subclass says so
        """Called in each worker process before its first completion, with no time limit: the place for slow imports,
        which would otherwise count against the first completion."""


class OnDemand(Sequence[Problem]):
    """Problems that are made when they are asked for.

    Args:
        make: Makes problem number i, the same one each time.
        numbers: The numbers of the problems.
    """

    def __init__(self, make: Callable[[int], Problem], numbers: range) -> None:
        self._make, self._numbers = make, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Problem: ...

    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...

    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self._make(number) for number in self._numbers[index]]
        return self._make(self._numbers[index])
