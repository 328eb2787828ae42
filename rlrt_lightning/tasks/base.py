"""The interface of a task: problems, and a verifier that judges completions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from rlrt_lightning.tasks.answers import readable

Messages = list[dict[str, str]]
"""A conversation in the format of chat templates: dicts with the keys `role` and `content`."""

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Problem:
    """One problem for the policy to solve.

    Args:
        id: Name of the problem, unique within its task.
        prompt: The prompt: plain text, or a conversation that ends with a user message.
        answer: The ground truth, in the form that the task's `verify` expects.
        solution: A reference solution as text, if the data has one.
        info: The other fields of the row.
    """

    id: str
    prompt: str | Messages
    answer: Any = None
    solution: str | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """The prompt as text; for a conversation, its last message."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]

    @property
    def answer_text(self) -> str | None:
        """The ground truth as text, such as "5 or 7" if several answers are correct; None if there is none."""
        return readable(self.answer)


@dataclass(frozen=True)
class Verdict:
    """The verifier's judgment of one completion.

    Args:
        reward: The reward r, usually 0 or 1.
        correct: Whether the completion solves the problem; used by avg@k and pass@k.
        answer: The answer found in the completion, as text.
        message: The reason for the verdict, for the sample tables.
        label: A category of the completion (its strategy, its language, ...). The fraction of each label is logged.
        fault: True if the verifier itself failed (it raised, hung or died); the completion then counts as wrong.
        rewards: The parts of the reward by name, if it has several; the mean of each is logged.
    """

    reward: float
    correct: bool
    answer: str | None = None
    message: str = ""
    label: str | None = None
    fault: bool = False
    rewards: dict[str, float] = field(default_factory=dict)


class Task(ABC):
    """Problems and their verifier. Subclass it for data that no existing task can read.

    A task is pickled and sent to the verifier's worker processes, so it must hold only settings and plain data.
    """

    isolated: bool = True
    """Whether `verify` runs in worker processes with a time limit. Set it to False only for code that is fast and safe
    for any completion."""

    @abstractmethod
    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split. The sequence may create its items on demand, and must be the same at each call.

        Raises:
            ConfigError: If the split's data is missing or unusable.
        """

    @abstractmethod
    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Judges one completion (`Rollout.text`). An exception becomes a verdict with `fault` set."""

    def observe(self, problems: Sequence[Problem], rewards: Sequence[Sequence[float]]) -> None:  # noqa: B027
        """Called on every rank with the same arguments when the rollouts of a training epoch are judged; for a
        curriculum, together with `admits`. If the task has `state_dict` and `load_state_dict`, its state is part of the
        checkpoints: plain values and tensors.

        Args:
            problems: The problems of the epoch, over all ranks, in the order in which they were drawn.
            rewards: The rewards of each problem's rollouts.
        """

    def admits(self, problem: Problem) -> bool:
        """Whether a training problem is used now; it must depend only on the problem and on what `observe` has seen.
        Other problems are left out until the next pass over the data."""
        return True

    def warm_up(self) -> None:  # noqa: B027 - optional hook
        """Called without a time limit in each worker process before its first completion. Slow imports belong here;
        otherwise they count against the time limit of the first completion."""


def has_curriculum(task: Task) -> bool:
    """Whether a task uses the rewards of the rollouts, or leaves out problems."""
    return type(task).observe is not Task.observe or type(task).admits is not Task.admits


def task_state(task: Any) -> dict[str, Any]:
    """A copy of a task's state as the entry `task`; empty if the task has no `state_dict` and `load_state_dict`."""
    saves = hasattr(task, "state_dict") and hasattr(task, "load_state_dict")
    return {"task": deepcopy(task.state_dict())} if saves else {}


class OnDemand(Sequence[Problem]):
    """Problems that are created on access.

    Args:
        make: Creates problem i; must return the same problem each time.
        numbers: The indices of the problems.
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
