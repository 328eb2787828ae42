"""The procedural tasks of the library reasoning-gym, which generates and scores problems."""

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
"""Appended to each question."""


PATTERN = r"<answer>((?:(?!<answer>).)*?)</answer>"
"""Matches `<answer>...</answer>`; the innermost one if they are nested."""

REPLACEMENTS = 100
"""Number of problems that are tried in place of a training problem with a held-out question."""


class ReasoningGym(Task):
    """One of the procedural tasks of the library reasoning-gym, with the task's own scorer.

    Problems are generated on demand and are the same for the same settings. The held-out problems are the
    generator's first ones, followed by the training problems. A training problem with the question of a held-out
    one is replaced by the next one without, so that the splits share none, however few problems the generator can
    make. The reward is the score, from 0 to 1; a completion is correct if its reward is 1. Some scorers call `eval`
    on the answer. In the verifier's processes, `eval` in reasoning-gym and in sympy's parser is restricted to
    literals and mathematics, so that no completion is executed; releases with which one would be are refused.

    Args:
        name: Name of the task in reasoning-gym, such as `chain_sum`.
        size: Number of training problems. They use no memory, but a few generators start more slowly with more.
        heldout: Number of held-out problems.
        seed: Seed of the problems of both splits.
        config: Settings of the generator, such as `{"min_terms": 3}`.
        instruction: Text appended to each question, which asks for the answer in the format that `pattern` matches.
        pattern: Regular expression; group 1 of its last match in a completion is the answer.
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
            raise ConfigError(f"pattern is not a regular expression: {error}") from None
        if groups < 1:
            raise ConfigError(f"pattern must have a group that captures the answer: {pattern!r}")
        for setting, value in (("size", size), ("heldout", heldout)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{setting} must be a whole number of problems, 1 or more, not {value!r}")
        for setting in ("seed", "size"):
            if setting in (config or {}):
                raise ConfigError(f"config must not contain {setting!r}; use the task's own setting {setting!r}")
        self.name = name
        self.size = size
        self.heldout = heldout
        self.seed = seed
        self.config = dict(config or {})
        self.instruction = instruction
        self.pattern = pattern
        self._generator: Any = None
        self._closed = False  # whether answers cannot be run in this process
        self._heldout_questions: frozenset[str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Some generators cannot be pickled.
        return {**self.__dict__, "_generator": None, "_closed": False, "_heldout_questions": None}

    def problems(self, split: Split) -> Sequence[Problem]:
        """The problems of a split, generated on access."""
        self._make_generator()
        if split == "train":
            return OnDemand(self._training_problem, range(self.heldout, self.heldout + self.size))
        return OnDemand(self._problem, range(self.heldout))

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Scores the answer that `pattern` matches."""
        found = [match[1] for match in re.finditer(self.pattern, completion, re.DOTALL) if match[1] is not None]
        if not found:
            return Verdict(0.0, False, message="no answer found")
        answer = found[-1].strip()
        reward = float(self._score(answer, problem.info))
        message = "right" if reward >= 1 else f"scored {reward:g}"
        if reward < 1 and problem.answer is not None:  # some tasks have a scorer but no answer
            message += f": an answer is {problem.answer}"
        return Verdict(reward, reward >= 1, answer, message)

    def warm_up(self) -> None:
        """Imports reasoning-gym, creates the generator, and makes sure that its scorer executes no answer."""
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
            # Generators draw problem i from seed + i, so consecutive seeds would share nearly all of their problems.
            seed = random.Random(f"reasoning-gym/{self.seed}").randrange(2**31)
            try:
                self._generator = create_dataset(self.name, seed=seed, size=self.heldout + self.size, **self.config)
            except (TypeError, ValueError, AssertionError) as error:
                raise ConfigError(f"reasoning-gym's task {self.name} rejects config or size: {error}") from None
        return self._generator

    def _training_problem(self, number: int) -> Problem:
        generator = self._make_generator()
        if self._heldout_questions is None:
            self._heldout_questions = frozenset(generator[i]["question"] for i in range(self.heldout))
        for offset in range(min(self.size, REPLACEMENTS)):
            candidate = self.heldout + (number - self.heldout + offset) % self.size
            entry = generator[candidate]
            if entry["question"] not in self._heldout_questions:
                return self._problem_of(entry, number)
        raise ConfigError(
            f"nearly all problems of reasoning-gym's task {self.name} are held-out ones: set a smaller heldout, or a "
            "config with more problems"
        )

    def _problem(self, number: int) -> Problem:
        return self._problem_of(self._make_generator()[number], number)

    def _problem_of(self, entry: dict[str, Any], number: int) -> Problem:
        return Problem(
            id=f"{self.name}-{self.seed}-{number}",
            prompt=f"{entry['question']}\n{self.instruction}",
            answer=entry["answer"],
            info=dict(entry),  # the scorer needs all of it
        )
