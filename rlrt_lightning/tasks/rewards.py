"""Rewards: what a completion is worth, given its problem. Any callable `(problem, completion)` can be one."""

from __future__ import annotations

import logging
import math
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from rlrt_lightning.errors import ConfigError
from rlrt_lightning.tasks.base import Problem, Verdict


class Reward(ABC):
    """A reward with settings. A plain function `(problem, completion) -> Verdict | float | bool` does as well."""

    isolated: bool = True
    """Whether it must run under the verifier's time limit; see `Task.isolated`."""

    @abstractmethod
    def __call__(self, problem: Problem, completion: str) -> Verdict | float | bool:
        """Judges one completion."""

    def warm_up(self) -> None:  # noqa: B027 - there is nothing to do unless a subclass says so
        """Does what is slow only once, such as imports; see `Task.warm_up`."""


RewardFunction = Callable[[Problem, str], "Verdict | float | bool"]


def as_verdict(value: Verdict | float | bool) -> Verdict:
    """What a reward returned, as a verdict.

    Args:
        value: A verdict, which is passed on, or a number or truth value: the reward. A completion counts as correct
            from a reward of 0.5 on.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it is a number that is not finite.
    """
    if isinstance(value, Verdict):
        return value
    if value is None or isinstance(value, (str, bytes)):
        raise TypeError(f"a reward must return a Verdict, a number or a bool, not {type(value).__name__}")
    reward = float(value)
    if not math.isfinite(reward):
        raise ValueError(f"a reward must be a finite number, not {reward}")
    return Verdict(reward, reward >= 0.5)


class MathReward(Reward):
    r"""Compares mathematical answers with the `math-verify` library: LaTeX, fractions, sets, intervals, matrices.

    The last `\boxed{}` of a completion is its answer. The ground truth may be a list of answers, any of which is right.

    Args:
        fallback: Whether a completion without a complete `\boxed{}` is judged by the last expression in it that
            math-verify takes for an answer ("the answer is 4"). Off, such a completion is wrong.
    """

    def __init__(self, fallback: bool = True) -> None:
        self.fallback = fallback

    def warm_up(self) -> None:
        """Imports math-verify and lets it build its tables."""
        _same(r"\frac{1}{2}", r"\boxed{0.5}")

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        """Judges one completion."""
        golds = problem.answer if isinstance(problem.answer, (list, tuple)) else [problem.answer]
        answer = last_boxed(completion)
        if answer is None:
            if not self.fallback:
                return Verdict(0.0, False, message=r"no \boxed{}")
            answer, text = _found(completion[-_TAIL:]), completion[-_TAIL:]
        else:
            answer, text = answer.strip(), rf"\boxed{{{answer}}}"
        if not answer:
            return Verdict(0.0, False, message="no answer found")
        correct = any(
            _plain(str(gold)) == _plain(answer) or (_comparable(str(gold), answer) and _same(str(gold), text))
            for gold in golds
        )
        message = "right" if correct else f"wrong: the answer is {' or '.join(map(str, golds))}"
        return Verdict(float(correct), correct, answer, message)


class ExactMatch(Reward):
    """Compares texts character by character, without the white space around them.

    Args:
        pattern: Regular expression that finds the answer in a completion; its last match counts, the first group of it
            if there is one. Empty: the whole completion is the answer. The command line reads values as YAML: give a
            pattern with `#` or `: ` in a configuration file, in quotes.
        ignore_case: Whether upper and lower case are the same.
    """

    def __init__(self, pattern: str = "", ignore_case: bool = False) -> None:
        try:
            self._pattern = re.compile(pattern, re.DOTALL) if pattern else None
        except re.error as error:
            raise ConfigError(f"pattern {pattern!r} is not a regular expression: {error}") from None
        self.pattern = pattern
        self.ignore_case = ignore_case
        self.isolated = bool(pattern)  # a pattern can take exponential time

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        """Judges one completion."""
        answer = completion
        if self._pattern is not None:
            match = next(iter(deque(self._pattern.finditer(completion), maxlen=1)), None)  # the last
            if match is None:
                return Verdict(0.0, False, message="the pattern matches nothing")
            answer = match[1] if self._pattern.groups else match[0]
            if answer is None:
                return Verdict(0.0, False, message="the pattern's first group matches nothing")
        answer, gold = answer.strip(), str(problem.answer).strip()
        correct = answer.casefold() == gold.casefold() if self.ignore_case else answer == gold
        return Verdict(float(correct), correct, answer, "right" if correct else f"wrong: the answer is {gold}")


_TAIL = 2_000  # the characters at the end in which an answer without a box is sought: the search is slow in long texts

_DENIAL = re.compile(r"\\neq?(?![a-zA-Z])|≠|!=|\\not(?![a-zA-Z])")
_BASE = re.compile(r"\d_\{?(\d+)")

_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{}` (or `\fbox{}`) whose braces are closed, or None."""
    last = None
    opened: list[int | None] = []  # for each open brace, where its box's contents start; None if it is no box
    for token in _BRACE.finditer(text):
        if token["box"]:
            opened.append(token.end())
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (last is None or start > last[0]):
                last = start, token.start()
    return text[slice(*last)] if last else None


def _plain(answer: str) -> str:
    """An answer without what never changes its meaning: equal texts are equal even if nothing can parse them."""
    answer = re.sub(r"\\(?:left|right|,|!|;|:)(?![a-zA-Z])|\$|\s+", "", answer)
    return re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", answer).rstrip(".")


def _comparable(gold: str, answer: str) -> bool:
    r"""Whether an answer differs from the ground truth in nothing that math-verify overlooks: a denial (`\neq 5`), and
    the base of a number (`101_2`, `101_3`)."""
    denied, other_base = (pattern.findall(gold) != pattern.findall(answer) for pattern in (_DENIAL, _BASE))
    return not denied and not (other_base and _BASE.search(gold) and _BASE.search(answer))


def _found(text: str) -> str | None:
    """The answer that math-verify finds in a text without a box, as text."""
    parsed = _parse(text)
    return str(parsed[-1]) if parsed else None


def _same(gold: str, text: str) -> bool:
    """Whether math-verify holds the answer that it finds in a text for the same as the ground truth."""
    from math_verify import verify

    boxed = last_boxed(gold)
    return verify(_parse_gold(gold if boxed is None else boxed), _parse(text), timeout_seconds=None)


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    # Its own time limits use signals, which work in main threads only, and it warns of each that is turned off. The
    # verifier's processes have a time limit of their own.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse(text, parsing_timeout=None)


@lru_cache(maxsize=1024)
def _parse_gold(gold: str) -> list[Any]:
    return _parse(rf"\boxed{{{gold}}}")
