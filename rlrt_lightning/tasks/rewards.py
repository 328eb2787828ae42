"""Rewards: functions that judge a completion of a problem. Any callable `(problem, completion)` can be one."""

from __future__ import annotations

import logging
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from decimal import Decimal
from functools import lru_cache
from typing import Any

from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.tasks.answers import (
    Truth,
    as_text,
    canonical,
    entries,
    has_adjacent_numbers,
    is_blank,
    normalized,
    number,
    readings,
    same_text,
    truths,
)
from rlrt_lightning.tasks.base import Problem, Verdict
from rlrt_lightning.tasks.notation import listed, parsed
from rlrt_lightning.tasks.patterns import compiled, found_by, last_match


class Reward(ABC):
    """A reward with settings. A plain function `(problem, completion) -> Verdict | float | bool` works too."""

    isolated: bool = True
    """Whether the reward must run under the verifier's time limit; see `Task.isolated`."""

    @abstractmethod
    def __call__(self, problem: Problem, completion: str) -> Verdict | float | bool:
        """Judges one completion."""

    def read_truth(self, value: Any) -> Any:
        """Converts the ground truth in the data to a problem's `answer`; called when the data is read.

        Returns:
            The ground truth as this reward expects it; an empty list if it is empty.

        Raises:
            ValueError: If this reward cannot compare with it. The message completes a sentence that begins with "the
                answer".
        """
        return value

    def warm_up(self) -> None:  # noqa: B027 - optional hook
        """Slow one-time work, such as imports; see `Task.warm_up`."""


RewardFunction = Callable[[Problem, str], "Verdict | float | bool"]


def as_verdict(value: Verdict | float | bool) -> Verdict:
    """Converts the return value of a reward to a verdict.

    Args:
        value: A verdict, which is returned unchanged, or the reward as a number or a bool. A completion counts as
            correct if its reward is at least 0.5.

    Raises:
        TypeError: If the value has another type.
        ValueError: If it is a non-finite number.
    """
    if isinstance(value, Verdict):
        return value
    if value is None or isinstance(value, (str, bytes)):
        raise TypeError(f"a reward must return a Verdict, a number or a bool, not {type(value).__name__}")
    reward = float(value)
    if not math.isfinite(reward):
        raise ValueError(f"a reward must be a finite number, not {reward}")
    return Verdict(reward, reward >= 0.5)


class WeightedRewards:
    """The weighted sum of several rewards (`DatasetTask.reward`).

    Args:
        rewards: The rewards by name.
        weights: The weights of some of them by name; the others have 1.
        correct_by: Name of the reward that decides whether a completion is correct, finds its answer and reads the
            ground truth; None for the first.

    Raises:
        ConfigError: If a name is unknown, or a weight is not finite.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward | RewardFunction],
        weights: Mapping[str, float] | None = None,
        correct_by: str | None = None,
    ) -> None:
        if not rewards:
            raise ConfigError("reward is an empty dict; it needs at least one reward by name")
        named = {"reward_weights": list(weights or {}), "correct_by": [correct_by] if correct_by else []}
        for setting, names in named.items():
            if unknown := sorted(set(names) - set(rewards)):
                raise ConfigError(f"{setting} has {unknown[0]!r}, but the rewards are {', '.join(rewards)}")
        self.rewards = dict(rewards)
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in rewards}
        for name, weight in self.weights.items():
            if not math.isfinite(weight):
                raise ConfigError(f"reward_weights: the weight of {name} is {weight}; it has to be finite")
        self.correct_by = correct_by or next(iter(self.rewards))
        self.deciding = self.rewards[self.correct_by]
        self.isolated = any(getattr(reward, "isolated", True) for reward in self.rewards.values())

    def warm_up(self) -> None:
        """Warms all rewards up."""
        for reward in self.rewards.values():
            getattr(reward, "warm_up", lambda: None)()

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        """Judges one completion. If one of the rewards fails, the completion counts as wrong."""
        verdicts = {name: as_verdict(reward(problem, completion)) for name, reward in self.rewards.items()}
        for name, verdict in verdicts.items():
            if verdict.fault:
                return replace(verdict, reward=0.0, correct=False, message=f"{name}: {verdict.message}")
        parts = {name: verdict.reward for name, verdict in verdicts.items()}
        total = sum(self.weights[name] * part for name, part in parts.items())
        labels = (verdict.label for verdict in verdicts.values() if verdict.label is not None)
        return replace(verdicts[self.correct_by], reward=total, label=next(labels, None), rewards=parts)


class MathReward(Reward):
    r"""Compares mathematical answers with the `math-verify` library: LaTeX, fractions, sets, intervals, matrices.

    The last `\boxed{}` of a completion is its answer. The ground truth may be a list of answers, any of which is
    correct.

    Args:
        fallback: Whether to judge a completion without a complete `\boxed{}` by the last expression that math-verify
            recognizes as an answer ("the answer is 4"). If false, such a completion is wrong.
    """

    def __init__(self, fallback: bool = True) -> None:
        self.fallback = fallback

    def warm_up(self) -> None:
        """Imports math-verify and initializes its tables."""
        _same(r"\frac{1}{2}", r"\boxed{0.5}")

    def read_truth(self, value: Any) -> Any:
        """Accepts strings, numbers, bools and lists of these, and a list of strings stored as text."""
        return _drop_empty(_decode(value), _golds)

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        """Judges one completion."""
        try:
            golds = _golds(_decode(problem.answer))
        except ValueError as error:
            return _unusable_truth(str(error))
        if not golds:
            return _unusable_truth("is empty")
        box = last_boxed(completion)
        if box is not None and len(box) > _MAX_EXTRA_CHARS + max(map(len, golds)):
            return Verdict(0.0, False, box.strip(), "wrong: far longer than the answer")
        answer, candidates = self._read(completion, box)
        if answer is None or not candidates:
            return Verdict(
                0.0, False, message="no answer found" if self.fallback or box is not None else r"no \boxed{}"
            )
        right = any(
            _equal(reading, *candidate)
            for gold in golds
            for reading in _gold_readings(gold)
            for candidate in candidates
        )
        return Verdict(float(right), right, answer, "right" if right else f"wrong: the answer is {' or '.join(golds)}")

    def _read(self, completion: str, box: str | None) -> tuple[str | None, list[tuple[str, str]]]:
        """The answer of a completion and, for each possible reading, its canonical form and the text in which
        math-verify finds it."""
        if box is not None:
            texts = [text for text in readings(canonical(box)) if not is_blank(text)]
            return box.strip(), [(text, rf"\boxed{{{text}}}") for text in texts]
        text = normalized(completion[-_TAIL_CHARS:])
        answer = _find_answer(text) if self.fallback else None
        return answer, [(canonical(answer), text)] if answer else []


class ExactMatch(Reward):
    """Compares strings exactly, ignoring leading and trailing whitespace.

    The ground truth may be a list of answers, any of which is correct. If the data holds a number (42.0, 1e-05) rather
    than a string, any notation of the same number is correct: 42, 0.00001. Bools are compared case-insensitively.

    Args:
        pattern: Regular expression that finds the answer in a completion. Its last match is used, or the first group
            of that match if the pattern has groups. Empty: the whole completion is the answer.
        ignore_case: Whether to ignore case.
    """

    def __init__(self, pattern: str = "", ignore_case: bool = False) -> None:
        self._pattern = compiled(pattern, "pattern") if pattern else None
        self.pattern = pattern
        self.ignore_case = ignore_case
        self.isolated = bool(pattern)  # a pattern can take exponential time

    def read_truth(self, value: Any) -> Any:
        """Accepts strings, numbers, bools and lists of these."""
        return _drop_empty(value, truths)

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        """Judges one completion."""
        answer = completion
        if self._pattern is not None:
            match = last_match(self._pattern, completion)
            if match is None:
                return Verdict(0.0, False, message="the pattern matches nothing")
            found = found_by(match)
            if found is None:
                return Verdict(0.0, False, message="the pattern's first group matches nothing")
            answer = found
        answer = answer.strip()
        try:
            golds = truths(problem.answer)
        except ValueError as error:
            return _unusable_truth(str(error))
        if not golds:
            return _unusable_truth("is empty")
        right = any(self._matches(gold, answer) for gold in golds)
        expected = " or ".join(map(as_text, golds))
        return Verdict(float(right), right, answer, "right" if right else f"wrong: the answer is {expected}")

    def _matches(self, gold: Truth, answer: str) -> bool:
        if isinstance(gold, Decimal):
            return number(answer) == gold
        if self.ignore_case or isinstance(gold, bool):
            return answer.casefold() == str(gold).casefold()
        return answer == gold


def _unusable_truth(why: str) -> Verdict:
    return Verdict(0.0, False, message=f"nothing to compare with: the ground truth {why}", fault=True)


def _drop_empty(value: Any, read: Callable[[Any], list[Any]]) -> Any:
    """Drops the entries of a ground truth in which `read` finds no answer; a single remaining entry is unwrapped."""
    kept = [entry for entry in entries(value) if read([entry])]
    return kept[0] if len(kept) == 1 else kept


def _golds(value: Any) -> list[str]:
    """The correct answers of a ground truth as text, without blank ones."""
    return [text for text in map(as_text, truths(value)) if not is_blank(text)]


def _decode(value: Any) -> Any:
    """Parses a list of strings or a dict stored as text, as in some datasets; returns other values unchanged."""
    if not isinstance(value, str):
        return value
    result = parsed(value) if re.match(r"\{\s*[\"']", value) else listed(value)
    return result if isinstance(result, (list, dict)) else value


_MAX_EXTRA_CHARS = 10_000  # by which an answer may be longer than the ground truth
_TAIL_CHARS = 2_000  # searched for an answer without a box: the search is slow in long texts

_NEGATION = re.compile(r"\\(?:ne|not|notin|n(?:less|gtr|leq|geq))(?![a-zA-Z])")
_RELATION = re.compile(r"[=<>]|\\(?:le|ge|in|not|notin|equiv|approx|sim)(?![a-zA-Z])")
_BASE = re.compile(r"\d_\{?(\d+)")

_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""The contents of the last `\boxed{}` (or `\fbox{}`) with balanced braces; None if there is none."""
    last = None
    opened: list[int | None] = []  # for each open brace, the start of its box's contents; None if it is not a box
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
def _gold_readings(gold: str) -> list[str]:
    """Possible readings of a ground truth, in canonical form."""
    boxed = last_boxed(gold)
    return readings(canonical(gold if boxed is None else boxed))


def _equal(gold: str, answer: str, text: str) -> bool:
    """Whether an answer equals a ground truth.

    Args:
        gold: The ground truth in canonical form.
        answer: The answer in canonical form.
        text: The text in which math-verify finds the answer.
    """
    if same_text(gold, answer):
        return True
    gold, answer, text = _without_negations(gold, answer, text)
    return _comparable(gold, answer) and _same(gold, text)


def _comparable(gold: str, answer: str) -> bool:
    r"""Whether math-verify can compare an answer with a ground truth. It ignores negations (`x \ne 5`) and the base of
    a number (`101_2`, `101_3`), and adds or multiplies adjacent numbers."""
    negated, other_base = (pattern.findall(gold) != pattern.findall(answer) for pattern in (_NEGATION, _BASE))
    if _NEGATION.search(gold):  # math-verify reads x = 2 next to x \ne 1 as another negation
        negated |= len(_RELATION.findall(gold)) != len(_RELATION.findall(answer))
    other_base = other_base and bool(_BASE.search(gold) and _BASE.search(answer))
    return not (negated or other_base or has_adjacent_numbers(gold) or has_adjacent_numbers(answer))


def _without_negations(*texts: str) -> tuple[str, ...]:
    r"""Replaces `\ne` by `=` in ground truth and answer if neither has another relation. math-verify does not compare
    negations, and these are equal if and only if the equations are."""
    if all(r"\ne " in text and not _RELATION.search(text) for text in texts):
        return tuple(text.replace(r"\ne ", "= ") for text in texts)
    return texts


def _find_answer(text: str) -> str | None:
    r"""The answer that math-verify finds in a text without a box, as text. None if there is none, or if the match is
    incomplete: it omits an adjacent number or a `\ne` before it."""
    expressions = _parse(text)
    if not expressions:
        return None
    found = str(expressions[-1])
    before, _, after = text.rpartition(found)
    return None if re.search(r"(?:\\ne|[0-9]) $", before) or re.match(r" \.?[0-9]", after) else found


def _same(gold: str, text: str) -> bool:
    """Whether math-verify considers the answer in a text equal to the ground truth."""
    from math_verify import verify

    golds, answers = _parse_gold(gold), _parse(text)
    return verify(golds, answers, timeout_seconds=None) and not _differ_in_value(golds, answers)


def _differ_in_value(golds: list[Any], answers: list[Any]) -> bool:
    """Whether two numbers differ although math-verify considers them equal: it rounds 1e-7 and 2e-7 to six decimals."""
    from sympy import Expr, UnevaluatedExpr

    if not all(isinstance(found[0], Expr) and not found[0].has(UnevaluatedExpr) for found in (golds, answers)):
        return False  # not numbers; or a percentage, which equals both 10 and 0.1
    try:
        return not math.isclose(float(golds[0]), float(answers[0]), rel_tol=1e-4)
    except (TypeError, ValueError, OverflowError):  # not real numbers
        return False


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    # math-verify's time limits use signals, which work in the main thread only, and it warns when they are turned off.
    # The verifier's processes have their own time limit.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse(text, parsing_timeout=None)


@lru_cache(maxsize=1024)
def _parse_gold(gold: str) -> list[Any]:
    return _parse(rf"\boxed{{{gold}}}")
