"""Rewards: what a completion is worth, given its problem. Any callable `(problem, completion)` can be one."""

from __future__ import annotations

import logging
import math
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from typing import Any

from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.tasks.answers import (
    Truth,
    apart,
    as_text,
    blank,
    canonical,
    entries,
    number,
    readings,
    respelled,
    same_text,
    truths,
)
from rlrt_lightning.tasks.base import Problem, Verdict
from rlrt_lightning.tasks.notation import listed, parsed


class Reward(ABC):
    """A reward with settings. A plain function `(problem, completion) -> Verdict | float | bool` does as well."""

    isolated: bool = True
    """Whether it must run under the verifier's time limit; see `Task.isolated`."""

    @abstractmethod
    def __call__(self, problem: Problem, completion: str) -> Verdict | float | bool:
        """Judges one completion."""

    def read_truth(self, value: Any) -> Any:
        """What becomes a problem's `answer` out of the ground truth that the data holds; called when data is read.

        Returns:
            The ground truth as this reward takes it; an empty list where it is empty.

        Raises:
            ValueError: If this reward cannot compare with it. Says why, as the rest of a sentence that begins with "the
                answer".
        """
        return value

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

    def read_truth(self, value: Any) -> Any:
        """Takes texts, numbers, truth values and lists of these; also a list of texts that is itself text."""
        return _without_empty(_inside(value), _golds)

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        """Judges one completion."""
        try:
            golds = _golds(_inside(problem.answer))
        except ValueError as error:
            return _no_truth(str(error))
        if not golds:
            return _no_truth("is empty")
        box = last_boxed(completion)
        if box is not None and len(box) > _LONGEST + max(map(len, golds)):
            return Verdict(0.0, False, box.strip(), "wrong: far longer than the answer")
        answer, meanings = self._read(completion, box)
        if answer is None or not meanings:
            return Verdict(
                0.0, False, message="no answer found" if self.fallback or box is not None else r"no \boxed{}"
            )
        right = any(_equal(truth, *meaning) for gold in golds for truth in _meanings(gold) for meaning in meanings)
        return Verdict(float(right), right, answer, "right" if right else f"wrong: the answer is {' or '.join(golds)}")

    def _read(self, completion: str, box: str | None) -> tuple[str | None, list[tuple[str, str]]]:
        """The answer of a completion, and for each meaning that it may have its canonical spelling and the text in
        which math-verify finds it."""
        if box is not None:
            return box.strip(), [(text, rf"\boxed{{{text}}}") for text in readings(canonical(box)) if not blank(text)]
        text = respelled(completion[-_TAIL:])
        answer = _found(text) if self.fallback else None
        return answer, [(canonical(answer), text)] if answer else []


class ExactMatch(Reward):
    """Compares texts character by character, without the white space around them.

    The ground truth may be a list of answers, any of which is right. Where the data holds a number (42.0, 1e-05), and
    not its text, an answer is right that is the same number: 42, 0.00001. True and false may begin with either case.

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

    def read_truth(self, value: Any) -> Any:
        """Takes texts, numbers, truth values and lists of these."""
        return _without_empty(value, truths)

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
        answer = answer.strip()
        try:
            golds = truths(problem.answer)
        except ValueError as error:
            return _no_truth(str(error))
        if not golds:
            return _no_truth("is empty")
        right = any(self._is(gold, answer) for gold in golds)
        expected = " or ".join(map(as_text, golds))
        return Verdict(float(right), right, answer, "right" if right else f"wrong: the answer is {expected}")

    def _is(self, gold: Truth, answer: str) -> bool:
        if isinstance(gold, Decimal):
            return number(answer) == gold
        if self.ignore_case or isinstance(gold, bool):
            return answer.casefold() == str(gold).casefold()
        return answer == gold


def _no_truth(why: str) -> Verdict:
    return Verdict(0.0, False, message=f"nothing to compare with: the ground truth {why}", fault=True)


def _without_empty(value: Any, found_in: Callable[[Any], list[Any]]) -> Any:
    """A ground truth's entries, as they came, in which a function finds something; a single one without its list."""
    full = [entry for entry in entries(value) if found_in([entry])]
    return full[0] if len(full) == 1 else full


def _golds(value: Any) -> list[str]:
    """The right answers of a ground truth as text, but those that say nothing in a formula."""
    return [text for text in map(as_text, truths(value)) if not blank(text)]


def _inside(value: Any) -> Any:
    """The list of texts or the dict that a text holds, as some data sets have their ground truths; else the value."""
    if not isinstance(value, str):
        return value
    inside = parsed(value) if re.match(r"\{\s*[\"']", value) else listed(value)
    return inside if isinstance(inside, (list, dict)) else value


_LONGEST = 10_000  # the characters by which an answer may be longer than the ground truth
_TAIL = 2_000  # the characters at the end in which an answer without a box is sought: the search is slow in long texts

_DENIAL = re.compile(r"\\(?:ne|not|notin|n(?:less|gtr|leq|geq))(?![a-zA-Z])")
_RELATION = re.compile(r"[=<>]|\\(?:le|ge|in|not|notin|equiv|approx|sim)(?![a-zA-Z])")
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


@lru_cache(maxsize=1024)
def _meanings(gold: str) -> list[str]:
    """What a ground truth may mean, in canonical spelling."""
    boxed = last_boxed(gold)
    return readings(canonical(gold if boxed is None else boxed))


def _equal(gold: str, answer: str, text: str) -> bool:
    """Whether an answer is a ground truth, both in canonical spelling.

    Args:
        gold: The ground truth.
        answer: The answer.
        text: What math-verify finds the answer in.
    """
    if same_text(gold, answer):
        return True
    gold, answer, text = _affirmed(gold, answer, text)
    return _comparable(gold, answer) and _same(gold, text)


def _comparable(gold: str, answer: str) -> bool:
    r"""Whether an answer differs from the ground truth in nothing that math-verify overlooks: a denial (`x \ne 5`), the
    base of a number (`101_2`, `101_3`), and numbers side by side, which it adds or multiplies."""
    denied, other_base = (pattern.findall(gold) != pattern.findall(answer) for pattern in (_DENIAL, _BASE))
    if _DENIAL.search(gold):  # math-verify takes x = 2 beside x \ne 1 for one more denial
        denied |= len(_RELATION.findall(gold)) != len(_RELATION.findall(answer))
    other_base = other_base and bool(_BASE.search(gold) and _BASE.search(answer))
    return not (denied or other_base or apart(gold) or apart(answer))


def _affirmed(*texts: str) -> tuple[str, ...]:
    r"""Ground truth and answer with `=` for `\ne` where neither holds another relation: the same numbers are denied if
    the equations are the same, and math-verify does not compare denials."""
    if all(r"\ne " in text and not _RELATION.search(text) for text in texts):
        return tuple(text.replace(r"\ne ", "= ") for text in texts)
    return texts


def _found(text: str) -> str | None:
    """The answer that math-verify finds in a text without a box, as text. None too where it left out what the answer
    is a part of: the other of two numbers side by side, or a sign that it does not equal."""
    expressions = _parse(text)
    if not expressions:
        return None
    found = str(expressions[-1])
    before, _, after = text.rpartition(found)
    return None if re.search(r"(?:\\ne|[0-9]) $", before) or re.match(r" \.?[0-9]", after) else found


def _same(gold: str, text: str) -> bool:
    """Whether math-verify holds the answer that it finds in a text for the same as the ground truth."""
    from math_verify import verify

    golds, answers = _parse_gold(gold), _parse(text)
    return verify(golds, answers, timeout_seconds=None) and not _far(golds, answers)


def _far(golds: list[Any], answers: list[Any]) -> bool:
    """Whether two numbers differ that math-verify, which rounds to six decimals, holds for the same: 1e-7 and 2e-7."""
    from sympy import Expr, UnevaluatedExpr

    if not all(isinstance(found[0], Expr) and not found[0].has(UnevaluatedExpr) for found in (golds, answers)):
        return False  # no numbers; or a percentage, which is worth both 10 and 0.1
    try:
        return not math.isclose(float(golds[0]), float(answers[0]), rel_tol=1e-4)
    except (TypeError, ValueError, OverflowError):  # no real numbers
        return False


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    # Its own time limits use signals, which work in main threads only, and it warns of each that is turned off. The
    # verifier's processes have a time limit of their own.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse(text, parsing_timeout=None)


@lru_cache(maxsize=1024)
def _parse_gold(gold: str) -> list[Any]:
    return _parse(rf"\boxed{{{gold}}}")
