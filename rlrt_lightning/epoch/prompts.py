"""Reading problems, and tokenizing and checking their prompts."""

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
"""Data sets of up to this many rows are checked at the start; larger and generated ones as their rows are used."""

SPARE_TOKENS = 16
"""Allowance for the number of tokens that a chat template adds, which may vary between prompts."""


class PromptReader:
    """Tokenizes prompts and checks their lengths.

    Args:
        policy: The policy, whose tokenizer is used.
        overlong: Whether prompts that are too long are dropped and counted, or an error.
    """

    def __init__(self, policy: Policy, overlong: Literal["drop", "error"]) -> None:
        self.policy = policy
        self.overlong = overlong

    def tokens(self, problem: Problem) -> list[int]:
        """Token ids of a prompt.

        Raises:
            ConfigError: If the prompt has no tokens or cannot be tokenized.
        """
        try:
            ids = self.policy.encode_prompt(problem.prompt)
        except ConfigError as error:
            raise ConfigError(f"problem {problem.id}: its prompt cannot be tokenized: {error}") from error
        except Exception as error:  # a tokenizer may raise any exception
            raise ConfigError(
                f"problem {problem.id}: its prompt cannot be tokenized: {type(error).__name__}: {first_line(error)}"
            ) from error
        if not ids:
            raise ConfigError(f"problem {problem.id}: its prompt has no tokens; it needs at least one")
        return ids

    def measure(self, problem: Problem, limit: int) -> tuple[int, list[int]]:
        """The number of a prompt's tokens, and their ids. A prompt that exceeds the limit even if every token is as
        long as the vocabulary's longest is not tokenized, which would take minutes for 100 MB; it gets a lower bound
        and no ids."""
        characters = _size(problem)
        if characters > limit and characters > limit * self._longest_token:
            return characters // self._longest_token, []
        tokens = self.tokens(problem)
        return len(tokens), tokens

    def tokens_within(self, problem: Problem, limit: int) -> list[int] | None:
        """Token ids of a prompt; None if it exceeds the limit and `overlong` is "drop".

        Raises:
            ConfigError: If it exceeds the limit and `overlong` is "error".
        """
        tokens, ids = self.measure(problem, limit)
        if tokens <= limit:
            return ids
        if self.overlong == "error":
            raise ConfigError(
                f"problem {problem.id}: its prompt has {tokens} tokens, more than data.max_prompt_tokens or the "
                f"model allow ({limit}); shorten it, or set data.overlong_prompts=drop"
            )
        return None

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.policy.tokenizer.get_vocab()))

    def check_lengths(self, where: str, problems: Sequence[Problem], limit: str, most: int, consequence: str) -> None:
        """Warns about prompts that are too long, or refuses them; also finds conversations that the chat template
        rejects. Large and generated data sets are checked as their rows are used.

        Args:
            where: Name of the problems, for messages.
            problems: The problems.
            limit: Name of the limit, for messages.
            most: Maximum number of tokens of a prompt.
            consequence: What happens to longer prompts, for messages.

        Raises:
            ConfigError: If a prompt is too long and `overlong` is "error".
        """
        if len(problems) > EAGER_ROWS or isinstance(problems, OnDemand):
            return
        shortest: dict[tuple[str, ...], Problem] = {}  # for each sequence of roles
        for problem in sorted(problems, key=_size):
            shortest.setdefault(_roles(problem), problem)
        added = {roles: len(self.tokens(p)) - _size(p) + SPARE_TOKENS for roles, p in shortest.items()}
        sizes: dict[int, int] = {}
        for i, problem in enumerate(problems):
            if _size(problem, in_bytes=True) + added[_roles(problem)] > most:  # a token has at least one byte
                tokens, _ = self.measure(problem, most)
                if tokens > most:
                    sizes[i] = tokens
        if not sizes:
            return
        examples = ", ".join(f"problem {problems[i].id}: its prompt has {sizes[i]} tokens" for i in list(sizes)[:5])
        text = f"{limit} is {most}: {len(sizes)} of {len(problems)} prompts of {where} are longer ({examples})"
        if self.overlong == "error":
            raise ConfigError(f"{text}; shorten them, or set data.overlong_prompts=drop")
        rank_zero_warn(f"{text}; {consequence}")

    def check_embeddings(self, problems: Sequence[Problem], *others: Callable[[Problem], object]) -> None:
        """Tokenizes all prompts if the tokenizer has tokens without an embedding; does nothing for other models.

        Args:
            problems: The problems; large and generated data sets are checked as their rows are used.
            others: Further functions that tokenize a problem.

        Raises:
            ConfigError: If a prompt has a token without an embedding.
        """
        if not self.policy.lacks_embeddings or len(problems) > EAGER_ROWS or isinstance(problems, OnDemand):
            return
        for problem in problems:
            for read in (self.tokens, *others):
                read(problem)


def read_problems(task: Task, split: Split, where: str) -> Sequence[Problem]:
    """Reads and checks a task's problems.

    Raises:
        ConfigError: If the task's code fails or returns something else than problems.
    """
    try:
        problems = task.problems(split)
        for problem in problems if len(problems) <= EAGER_ROWS and not isinstance(problems, OnDemand) else ():
            if not (
                isinstance(problem, Problem)
                and all(isinstance(text, str) for text in (*_texts(problem), *_roles(problem)))
            ):
                raise TypeError(f"not a Problem with a prompt of text or messages: {reprlib.repr(problem)}")
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
