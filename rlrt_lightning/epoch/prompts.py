"""Problems as they are read at the start, and their prompts as tokens."""

from __future__ import annotations

import reprlib
import traceback
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from lightning.pytorch.utilities import rank_zero_warn

from rlrt_lightning.runtime.errors import ConfigError, first_line
from rlrt_lightning.tasks import Problem, Task
from rlrt_lightning.tasks.base import OnDemand, Split

if TYPE_CHECKING:
    from rlrt_lightning.policy.model import Policy

EAGER_ROWS = 100_000
"""Data sets up to this size are checked row by row at the start; larger ones, and endless ones, as rows are drawn."""

SPARE_TOKENS = 16
"""What a chat template may add to one prompt more than to another."""


class PromptReader:
    """Prompts as tokens, and how many they are.

    Args:
        policy: Whose tokenizer reads them.
        overlong: What to do with prompts that are too long: drop and count them, or stop with an error.
    """

    def __init__(self, policy: Policy, overlong: Literal["drop", "error"]) -> None:
        self.policy = policy
        self.overlong = overlong

    def tokens(self, problem: Problem) -> list[int]:
        """Tokens of a prompt.

        Raises:
            ConfigError: If it has none, or cannot be made tokens.
        """
        try:
            ids = self.policy.encode_prompt(problem.prompt)
        except ConfigError as error:
            raise ConfigError(f"problem {problem.id}: its prompt cannot be made tokens: {error}") from error
        except Exception as error:  # a chat template refuses a conversation by raising whatever it likes
            raise ConfigError(
                f"problem {problem.id}: its prompt cannot be made tokens: {type(error).__name__}: {first_line(error)}"
            ) from error
        if not ids:
            raise ConfigError(f"problem {problem.id}: its prompt has no tokens, and a response needs one to follow")
        return ids

    def measured(self, problem: Problem, most: int) -> tuple[int, list[int]]:
        """The number of a prompt's tokens, and the tokens. A prompt that is longer than so many of the longest token is
        too long however it is cut, and left whole: to take one of 100 MB apart would need minutes."""
        characters = _size(problem)
        if characters > most and characters > most * self._longest_token:
            return characters // self._longest_token, []
        tokens = self.tokens(problem)
        return len(tokens), tokens

    def within(self, problem: Problem, limit: int) -> list[int] | None:
        """Tokens of a prompt; None where there are more than the limit and such prompts are dropped.

        Raises:
            ConfigError: If there are more, and `overlong` says so.
        """
        tokens, ids = self.measured(problem, limit)
        if tokens <= limit:
            return ids
        if self.overlong == "error":
            raise ConfigError(
                f"problem {problem.id}: its prompt has {tokens} tokens, more than data.max_prompt_tokens or the "
                f"model allow ({limit}); shorten it or set data.overlong_prompts to drop"
            )
        return None

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.policy.tokenizer.get_vocab()))

    def check_lengths(self, where: str, problems: Sequence[Problem], limit: str, most: int, fate: str) -> None:
        """Counts the prompts that are too long, where the data is there; what is made on demand is checked as it is
        drawn. Finds conversations that the chat template refuses, too.

        Args:
            where: What the problems are, in words.
            problems: The problems.
            limit: The limit in words.
            most: Tokens that a prompt may have.
            fate: What becomes of longer ones.

        Raises:
            ConfigError: If there are any, and `overlong` says so.
        """
        if len(problems) > EAGER_ROWS or isinstance(problems, OnDemand):
            return
        shortest: dict[tuple[str, ...], Problem] = {}  # of each sequence of roles
        for problem in sorted(problems, key=_size):
            shortest.setdefault(_roles(problem), problem)
        added = {roles: len(self.tokens(p)) - _size(p) + SPARE_TOKENS for roles, p in shortest.items()}
        sizes: dict[int, int] = {}
        for i, problem in enumerate(problems):
            if _size(problem, in_bytes=True) + added[_roles(problem)] > most:  # a token is a byte of text at least
                tokens, _ = self.measured(problem, most)
                if tokens > most:
                    sizes[i] = tokens
        if not sizes:
            return
        examples = ", ".join(f"problem {problems[i].id}: its prompt has {sizes[i]} tokens" for i in list(sizes)[:5])
        text = f"{limit} is {most}: {len(sizes)} of {len(problems)} prompts of {where} are longer ({examples})"
        if self.overlong == "error":
            raise ConfigError(f"{text}; shorten them or set data.overlong_prompts to drop")
        rank_zero_warn(f"{text}; {fate}")

    def check_embeddings(self, problems: Sequence[Problem], *others: Callable[[Problem], object]) -> None:
        """Reads all prompts where the tokenizer has tokens that the model lacks; other models can do without.

        Args:
            problems: The problems; what is made on demand is checked as it is drawn.
            others: What else is made of a problem.

        Raises:
            ConfigError: If a prompt has such a token.
        """
        if not self.policy.lacks_embeddings or len(problems) > EAGER_ROWS or isinstance(problems, OnDemand):
            return
        for problem in problems:
            for read in (self.tokens, *others):
                read(problem)


def read_problems(task: Task, split: Split, where: str) -> Sequence[Problem]:
    """A task's problems; what its own code does wrong is said in one line."""
    try:
        problems = task.problems(split)
        for problem in problems if len(problems) <= EAGER_ROWS and not isinstance(problems, OnDemand) else ():
            if not (
                isinstance(problem, Problem)
                and all(isinstance(text, str) for text in (*_texts(problem), *_roles(problem)))
            ):
                raise TypeError(f"no Problem with a prompt in text or messages: {reprlib.repr(problem)}")
        return problems
    except ConfigError:
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{where}: {type(task).__name__}.problems({split!r}) failed: {type(error).__name__}: {first_line(error)} "
            f"({at.filename}, line {at.lineno})"
        ) from error


def _texts(problem: Problem) -> list[str]:
    return [problem.prompt] if isinstance(problem.prompt, str) else [m["content"] for m in problem.prompt]


def _roles(problem: Problem) -> tuple[str, ...]:
    return () if isinstance(problem.prompt, str) else tuple(m["role"] for m in problem.prompt)


def _size(problem: Problem, in_bytes: bool = False) -> int:
    """Characters, or bytes, of a prompt."""
    return sum(len(text.encode("utf-8", "surrogatepass") if in_bytes else text) for text in _texts(problem))
