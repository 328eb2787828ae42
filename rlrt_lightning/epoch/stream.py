"""The prompts of one epoch after the other: endless, shuffled, and the same after a resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlrt_lightning.epoch.prompts import PromptReader
from rlrt_lightning.epoch.record import Questions
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.ranks import rank, world_size
from rlrt_lightning.runtime.seeding import derive_seed, generator
from rlrt_lightning.tasks import Problem

MOST_MISSES = 1000
"""So many prompts in a row that are too long: the limit is wrong."""


@dataclass
class Position:
    """How far the prompts have been read: with the seed, all that an exact resume needs between two epochs.

    Args:
        epochs: Epochs that were made.
        cursor: Prompts that were read, those that were left out included.
        overlong: Prompts that were left out.
    """

    epochs: int = 0
    cursor: int = 0
    overlong: int = 0


class PromptStream:
    """Deals out the training problems.

    Args:
        problems: All of them.
        reader: Makes prompts tokens.
        limit: Longest prompt, in tokens.
        seed: Seed of the run.
        position: Where to go on.
    """

    def __init__(
        self, problems: Sequence[Problem], reader: PromptReader, limit: int, seed: int, position: Position
    ) -> None:
        self.problems, self.reader, self.limit, self.seed = problems, reader, limit, seed
        self.position = position
        self._order: tuple[int, Tensor] | None = None

    def questions(self, count: int) -> Questions:
        """This rank's share of the next epoch's `count` problems, and moves on. Every rank reads all of them, since
        which ones are too long decides what comes next.

        Raises:
            ConfigError: If too many prompts in a row are too long.
        """
        position, problems, prompts, missed = self.position, list[Problem](), list[list[int]](), 0
        while len(problems) < count:
            if missed >= min(len(self.problems), MOST_MISSES):
                raise ConfigError(
                    f"data.max_prompt_tokens is {self.limit}: each of {missed} prompts in a row was longer"
                )
            problem = self.problems[self._row(position.cursor)]
            position.cursor += 1
            ids = self.reader.within(problem, self.limit)
            if ids is None:
                position.overlong, missed = position.overlong + 1, missed + 1
            else:
                problems.append(problem)
                prompts.append(ids)
                missed = 0
        epoch, position.epochs = position.epochs, position.epochs + 1
        places = range(rank(), count, world_size())
        seeds = [derive_seed(self.seed, "rollouts", epoch, place) for place in places]
        return Questions(epoch, [problems[i] for i in places], [prompts[i] for i in places], seeds, places)

    def __iter__(self) -> Iterator[Problem]:
        """The problems of the first round, in their order."""
        return (self.problems[self._row(i)] for i in range(len(self.problems)))

    def _row(self, cursor: int) -> int:
        """Which row comes at a position of the endless order; each round over the data has an order of its own."""
        round_, place = divmod(cursor, len(self.problems))
        if self._order is None or self._order[0] != round_:
            shuffle = generator(self.seed, "prompts", round_)
            self._order = round_, torch.randperm(len(self.problems), generator=shuffle)
        return int(self._order[1][place])
