"""The procedural tasks of the library reasoning-gym, which makes and scores endless problems."""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.tasks.base import OnDemand, Problem, Split, Task, Verdict
from rlrt_lightning.tasks.closed_eval import close_eval

INSTRUCTION = "Reason step by step, and put your final answer, and nothing else, between <answer> and </answer>."
"""What is asked for after each question."""


PATTERN = r"<answer>((?:(?!<answer>).)*?)</answer>"
"""The last `<answer>...</answer>`, the innermost where they are nested."""


class ReasoningGym(Task):
    """One of the procedural tasks of the library reasoning-gym: problems without end, with a scorer of their own.

    Problems are made on demand, the same ones for the same settings. The held-out problems are the generator's first
    and the training problems those after them, so that no draw is used twice; a generator with few possible problems
    may still draw the same one for both. The reward is the scorer's, from 0 to 1; a completion is correct at 1. Some
    scorers give the answer to `eval`: in the verifier's processes, reasoning-gym and sympy's parser know literals and
    mathematics only, so that no completion is run; a release of theirs with which one would be is refused.

    Args:
        name: Name of the task in reasoning-gym, such as `chain_sum`.
        size: Number of training problems; they take no memory, but a few generators take longer to start with more.
        heldout: Number of held-out problems.
        seed: Seed of the problems of both splits.
        config: Settings of the generator, such as `{"min_terms": 3}`.
        instruction: Text after each question, which asks for the answer in the form that `pattern` finds.
        pattern: Regular expression whose group 1, in its last match in a completion, is the answer.
    """

    def __init__(
        self,
        name: str,
        size: int = 100_000,
        heldout: int = 200,
        seed: int = 0,
        config: dict[str, Any] | None = None,
        instruction: str = INSTRUCTION,
        pattern: str = PATTERN,
    ) -> None:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ConfigError(f"pattern is no regular expression: {error}") from None
        if groups < 1:
            raise ConfigError(f"pattern must have a group, which is the answer: {pattern!r}")
        for setting, value in (("size", size), ("heldout", heldout)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{setting} must be a whole number of problems, 1 or more, not {value!r}")
        for setting in ("seed", "size"):
            if setting in (config or {}):
                raise ConfigError(f"config must not hold {setting!r}: it is a setting of the task itself")
        self.name = name
        self.size = size
        self.heldout = heldout
        self.seed = seed
        self.config = dict(config or {})
        self.instruction = instruction
        self.pattern = pattern
        self._generator: Any = None
        self._closed = False  # whether answers cannot be run in this process

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generator": None, "_closed": False}  # some generators do not pickle

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split, each made when it is asked for."""
        self._make_generator()
        first, count = (self.heldout, self.size) if split == "train" else (0, self.heldout)
        return OnDemand(self._problem, range(first, first + count))

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Scores the answer that `pattern` finds."""
        found = [match[1] for match in re.finditer(self.pattern, completion, re.DOTALL) if match[1] is not None]
        if not found:
            return Verdict(0.0, False, message="no answer where pattern looks for one")
        answer = found[-1].strip()
        reward = float(self._score(answer, problem.info))
        message = "right" if reward >= 1 else f"scored {reward:g}"
        if reward < 1 and problem.answer is not None:  # some tasks only have a scorer
            message += f": an answer is {problem.answer}"
        return Verdict(reward, reward >= 1, answer, message)

    def warm_up(self) -> None:
        """Imports reasoning-gym, makes the generator, and sees to it that its scorer runs no answer."""
        generator = self._make_generator()
        close_eval(partial(generator.score_answer, entry=generator[0]))
        self._closed = True

    def _score(self, answer: str, entry: dict[str, Any]) -> float:
        if not self._closed:
            self.warm_up()
        return self._make_generator().score_answer(answer=answer, entry=entry)

    def _make_generator(self) -> Any:
        if self._generator is None:
            try:
                from reasoning_gym.factory import DATASETS, create_dataset
            except ImportError as error:
                raise ConfigError(
                    f"the task ReasoningGym needs a package: pip install 'rlrt-lightning[reasoning-gym]' ({error})"
                ) from None
            if self.name not in DATASETS:
                near = difflib.get_close_matches(self.name, DATASETS, cutoff=0.5)
                hint = f"; did you mean {' or '.join(near)}?" if near else f"; one of {', '.join(sorted(DATASETS))}"
                raise ConfigError(f"reasoning-gym has no task {self.name!r}{hint}")
            # Generators draw problem i from seed + i. Neighbouring seeds would share nearly all of their problems.
            seed = random.Random(f"reasoning-gym/{self.seed}").randrange(2**31)
            try:
                self._generator = create_dataset(self.name, seed=seed, size=self.heldout + self.size, **self.config)
            except (TypeError, ValueError, AssertionError) as error:
                raise ConfigError(f"reasoning-gym's task {self.name} refuses config or size: {error}") from None
        return self._generator

    def _problem(self, number: int) -> Problem:
        entry = self._make_generator()[number]
        return Problem(
            id=f"{self.name}-{self.seed}-{number}",
            prompt=f"{entry['question']}\n{self.instruction}",
            answer=entry["answer"],
            info=dict(entry),  # its scorer wants all of it
        )
