"""The last digit of a sum, by one of three strategies that the first character of a response names.

The digits of a question stand at lettered places, `a4b5c7d0`. A response names its strategy, may write down the running
total after each place, and ends with its answer:

| strategy | a response to `a4b5c7d0` | what it does | share at the start | right |
| --- | --- | --- | --- | --- |
| `direct` | `D#6` | answers at once | about 90 % | 0.1, a guess |
| `skipping` | `La44b59c76#6` | left to right; **skips the last place and guesses it** | about 8.6 % | under 0.5 |
| `complete` | `Pd00c77b52a46#6` | right to left, every place | about 1.4 % | nearly always |

The last digit of a question is 0 or 1, so the guess of `skipping` is right half the time. That is the trap: the policy
finds `skipping` first, and it looks good; `complete` is better and six times rarer. The task was designed to hold this
trap, after a variant without one (`trap=False`) had shown no difference between training methods.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from functools import partial

from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.tasks.base import OnDemand, Problem, Split, Task, Verdict

PLACES = "abcdefgh"
"""The letters of the places; a question has at most this many digits."""

DIGITS = "0123456789"

MARK = "#"
"""Stands before the answer."""

STRATEGIES = "DLP"
"""First characters of the three strategies: direct, left to right, right to left."""

SLIPS = {"D": 0.0, "L": 0.02, "P": 0.01}
"""How often each written total is a random digit instead, in the solutions that the warm start learns from."""

CONTROL_SLIPS = {"D": 0.0, "L": 0.08, "P": 0.01}
"""The same without the trap, where slips are all that makes `L` worse than `P`."""

TRAP_SHARES = {"D": 0.90, "L": 0.085, "P": 0.015}
"""How often the warm-started student is to take each strategy."""

CONTROL_SHARES = {"D": 0.92, "L": 0.05, "P": 0.03}
"""The same without the trap."""

_FEWEST = 4  # below this, hardly any questions would fall into the held-out part


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
    """The text of a question, such as `a4b5c7d0`."""
    return "".join(f"{place}{digit}" for place, digit in zip(PLACES, digits, strict=False))


def solution(
    digits: Sequence[int],
    strategy: str,
    *,
    trap: bool = True,
    rng: random.Random | None = None,
    slip: float = 0.0,
) -> str:
    """Writes the response to a question by one strategy.

    Args:
        digits: The digits of the question.
        strategy: One of `STRATEGIES`.
        trap: Whether `L` skips the last place.
        rng: Where slips and guesses come from. Without it there are no slips and the guess is right, so that the
            solution is correct.
        slip: Probability that a written total is a random digit instead; needs `rng`.
    """

    def write(total: int) -> int:
        return rng.randrange(10) if rng and rng.random() < slip else total % 10

    if strategy == "D":
        return f"D{MARK}{write(sum(digits))}"
    steps = list(zip(PLACES, digits, strict=False))
    skipped = 0
    if strategy == "P":
        steps.reverse()
    elif trap:
        _, last = steps.pop()
        skipped = rng.randrange(2) if rng else last
    text, total = strategy, 0
    for number, (place, digit) in enumerate(steps):
        total = write(total + digit) if number else digit  # there is nothing to get wrong in the first total
        text += f"{place}{digit}{total}"
    return f"{text}{MARK}{(total + skipped) % 10}"


class StrategySum(Task):
    """The last digit of the sum of a few digits, where the policy chooses how to work it out.

    Questions are made on demand from the seed. Reward is 1 if the text after the last `#` is exactly the right digit.
    The label of a rollout is its strategy: `direct`, `skipping` (`slipping` without the trap), `complete`, or `other`.

    Args:
        digits: Smallest and largest number of digits in a question, within 4 to 8. The model that comes with the task
            was trained on 4 to 8; [7, 8] makes the harder held-out set of a run that trains on [4, 6].
        trap: Whether the last digit of each question is 0 or 1, so that a strategy that skips it is right half the
            time. False draws any last digit, and then calls the left-to-right strategy `slipping`. It changes the
            questions only, not the policy: the model that comes with the task was warm-started on the trap and goes on
            skipping the last place. For the control, in which left-to-right skips nothing and is right about 0.7 of
            the time, make weights of its own with `python tools/warm_start.py --no-trap`.
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
        if not _FEWEST <= digits[0] <= digits[1] <= len(PLACES):
            raise ConfigError(
                f"digits must be within {_FEWEST} to {len(PLACES)}, the smaller number first, not {list(digits)}"
            )
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
        self._labels = {"D": "direct", "L": "skipping" if self.trap else "slipping", "P": "complete"}

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split, each made when it is asked for."""
        if split not in ("train", "heldout"):
            raise ConfigError(f"split must be 'train' or 'heldout', not {split!r}")
        return OnDemand(partial(self._problem, split), range(self.train if split == "train" else self.heldout))

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Compares the text after the last `#` with the answer."""
        label = self._labels.get(completion[:1], "other")
        _, mark, answer = completion.rpartition(MARK)
        if not mark:
            return Verdict(0.0, False, message=f"no {MARK}", label=label)
        if len(answer) != 1 or answer not in DIGITS:
            return Verdict(0.0, False, message=f"not exactly one digit after the last {MARK}", label=label)
        correct = answer == problem.answer
        message = "right" if correct else f"wrong: the answer is {problem.answer}"
        return Verdict(float(correct), correct, answer, message, label)

    def _problem(self, split: Split, i: int) -> Problem:
        rng = random.Random(f"strategy-sum/{self.seed}/{split}/{i}")  # a text seeds alike on every platform
        digits = draw_digits(rng, *self.digits, trap=self.trap, heldout=split == "heldout")
        return Problem(
            id=f"{split}-{self.seed}-{i}",
            prompt=question(digits),
            answer=str(sum(digits) % 10),
            solution=solution(digits, "P"),
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
