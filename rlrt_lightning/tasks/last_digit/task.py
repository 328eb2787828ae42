"""The last digit of a sum, found in one of three ways.

To `tea 4 milk 5 eggs 7 rice 0, last digit of the total?` a completion may be

| label | completion | what it does | share at the start | correct |
| --- | --- | --- | --- | --- |
| `guess` | `guess 6` | answers at once | 92 % | 0.1 |
| `skip` | `skip the last: tea 4 milk 5 (9) eggs 7 (6), guess 6` | adds all but the last, then guesses | 6.5 % | 0.5 |
| `careful` | `carefully: tea 4 milk 5 (9) eggs 7 (6) rice 0 (6), so 6` | adds all numbers | 1.4 % | nearly 1 |

The running total after each item is in parentheses; only its last digit is kept. The last number of a question is 0 or
1, so `skip` is right half the time. That is the trap: `skip` is found first and looks good, `careful` is better and
rarer. The task was designed with this trap, after a variant without it (`trap=False`) had shown no difference between
the methods.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence
from functools import partial

from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.tasks.base import OnDemand, Problem, Split, Task, Verdict

ITEMS = ("tea", "milk", "eggs", "rice", "corn", "nuts", "salt", "figs")
"""What is bought, in this order; a question has the first 4 to 8 of them."""

WAYS = {"guess": "guess", "skip": "skip the last:", "quick": "quickly:", "careful": "carefully:"}
"""The labels of the ways, and the words that a response by each begins with."""

SLIPS = {"guess": 0.0, "skip": 0.02, "quick": 0.08, "careful": 0.01}
"""How often each total is a random digit instead, in the solutions that the warm start learns from."""

TRAP_SHARES = {"guess": 0.9, "skip": 0.085, "careful": 0.015}
"""The share of each way in the solutions that the warm start learns from."""

CONTROL_SHARES = {"guess": 0.92, "quick": 0.05, "careful": 0.03}
"""The same for the control without the trap."""

FEWEST, MOST = 4, 8
"""Bounds on the count of numbers in a question. Below 4, hardly any questions would fall into the held-out part."""

TEACHER_TEMPLATE = "{prompt} a correct solution: {context}. now answer:"
"""The prompt of the teacher (`model.teacher.template`) that the model that comes with the task has learnt."""

_ANSWER = re.compile(r"(.*)\b(?:guess|so) ([0-9])\Z")


def is_heldout(digits: Sequence[int]) -> bool:
    """Whether these digits, in whatever order, are kept for the held-out questions: one in eight sets of digits is."""
    return zlib.crc32(bytes(sorted(digits))) % 8 == 0


def draw_digits(rng: random.Random, fewest: int, most: int, *, trap: bool = True, heldout: bool = False) -> list[int]:
    """Draws the digits of one question.

    Args:
        rng: The random stream to draw from.
        fewest: The smallest number of digits.
        most: The largest number of digits.
        trap: Whether the last digit is 0 or 1 only.
        heldout: Whether to draw a held-out question or one for training. The two never share a set of digits.
    """
    while True:
        digits = [rng.randrange(10) for _ in range(rng.randint(fewest, most))]
        if trap:
            digits[-1] = rng.randrange(2)
        if is_heldout(digits) == heldout:
            return digits


def question(digits: Sequence[int]) -> str:
    """The text of a question, such as `tea 4 milk 5 eggs 7 rice 0, last digit of the total?`."""
    return f"{_listed(digits)}, last digit of the total?"


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(f"{item} {number}" for item, number in zip(ITEMS, numbers, strict=False))


def solution(digits: Sequence[int], way: str, rng: random.Random | None = None) -> str:
    """Writes the response to a question in one of the ways.

    Args:
        digits: The digits of the question.
        way: One of `WAYS`.
        rng: Where slips and guesses come from. Without it there are no slips and the guess is right, so that the
            solution is correct.
    """

    def write(total: int) -> int:
        return rng.randrange(10) if rng and rng.random() < SLIPS[way] else total % 10

    if way == "guess":
        return f"guess {sum(digits) % 10 if rng is None else rng.randrange(10)}"
    totals = [digits[0]]  # there is nothing to get wrong in the first total
    for digit in digits[1:-1] if way == "skip" else digits[1:]:
        totals.append(write(totals[-1] + digit))
    steps = zip(ITEMS[1:], digits[1:], totals[1:], strict=False)
    working = " ".join([f"{ITEMS[0]} {digits[0]}", *(f"{item} {digit} ({total})" for item, digit, total in steps)])
    if way == "skip":
        last = digits[-1] if rng is None else rng.randrange(2)
        return f"{WAYS[way]} {working}, guess {(totals[-1] + last) % 10}"
    return f"{WAYS[way]} {working}, so {totals[-1]}"


class LastDigit(Task):
    """The last digit of a sum, where the policy chooses how to work it out.

    Questions are made on demand from the seed. Reward is 1 if a completion ends with `guess` or `so` and the correct
    digit. The label of a rollout is its way, by what it does: `guess`, `skip`, `careful`, `quick` (only in the
    control), or `other` for a completion without an answer.

    Args:
        digits: Smallest and largest count of numbers in a question, within 4 to 8. The model that comes with the task
            was trained on 4 to 8; [7, 8] makes the harder held-out set of a run that trains on [4, 6].
        trap: Whether the last number of each question is 0 or 1, so that skipping it is right half the time. False
            draws any digit. It changes the questions only, not the policy: the model that comes with the task was
            warm-started on the trap and still skips the last number. For the control, which has a way with slips
            (`quickly:`) in place of `skip the last:`, make a model with `python tools/warm_start.py --no-trap`.
        heldout: Number of held-out problems. No set of digits is in both splits, whatever the seed.
        train: Number of training problems; they take no memory.
        seed: Seed of the questions of both splits.
    """

    isolated = False  # a few string operations, which no completion can make slow

    def __init__(
        self,
        digits: tuple[int, int] = (4, 6),
        trap: bool = True,
        heldout: int = 160,
        train: int = 1_000_000,
        seed: int = 0,
    ) -> None:
        if not isinstance(digits, (list, tuple)) or len(digits) != 2 or not all(map(_is_int, digits)):
            raise ConfigError(f"digits must be two whole numbers, the smallest and the largest, not {digits!r}")
        if not FEWEST <= digits[0] <= digits[1] <= MOST:
            raise ConfigError(f"digits must be within {FEWEST} to {MOST}, the smaller number first, not {list(digits)}")
        for name, size in (("heldout", heldout), ("train", train)):
            if not _is_int(size) or size < 1:
                raise ConfigError(f"{name} must be a whole number of problems, 1 or more, not {size!r}")
        if not _is_int(seed):
            raise ConfigError(f"seed must be a whole number, not {seed!r}")
        self.digits = (digits[0], digits[1])
        self.trap = bool(trap)
        self.heldout = heldout
        self.train = train
        self.seed = seed

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split, each made when it is asked for."""
        if split not in ("train", "heldout"):
            raise ConfigError(f"split must be 'train' or 'heldout', not {split!r}")
        return OnDemand(partial(self._problem, split), range(self.train if split == "train" else self.heldout))

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Compares the digit at the end of the completion with the answer."""
        found = _ANSWER.match(completion)
        if not found:
            return Verdict(0.0, False, message="does not end with guess or so and one digit", label="other")
        working, digit = found.groups()
        correct = digit == problem.answer
        message = "right" if correct else f"wrong: the answer is {problem.answer}"
        return Verdict(float(correct), correct, digit, message, _way(problem, working))

    def _problem(self, split: Split, i: int) -> Problem:
        rng = random.Random(f"last-digit/{self.seed}/{split}/{i}")  # a text seeds alike on every platform
        digits = draw_digits(rng, *self.digits, trap=self.trap, heldout=split == "heldout")
        return Problem(
            id=f"{split}-{self.seed}-{i}",
            prompt=question(digits),
            answer=str(sum(digits) % 10),
            solution=solution(digits, "careful"),
        )


def _way(problem: Problem, working: str) -> str:
    """The label of a completion by the items that it adds up, whatever its first words say."""
    asked = [item for item in ITEMS if item in problem.prompt]
    added = [item for item in asked if item in working]
    if not added:
        return "guess"
    if len(added) < len(asked):
        return "skip"
    return "quick" if working.startswith(WAYS["quick"]) else "careful"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
