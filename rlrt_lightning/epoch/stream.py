"""The endless, shuffled stream of training prompts, which a resumed run continues exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
"""This many consecutive prompts that are too long are an error."""


@dataclass
class Position:
    """The position in the stream. Together with the seed, it is sufficient to resume between two epochs.

    Args:
        epochs: Number of epochs made.
        cursor: Number of prompts read, including dropped ones.
        overlong: Number of prompts dropped because they were too long.
    """

    epochs: int = 0
    cursor: int = 0
    overlong: int = 0


class PromptStream:
    """Yields the training problems of each epoch.

    Args:
        problems: All training problems.
        reader: Tokenizes the prompts.
        limit: Maximum prompt length, in tokens.
        seed: Seed of the run.
        position: Position at which to start.
        admits: Whether a problem is used now; the others are left out.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        reader: PromptReader,
        limit: int,
        seed: int,
        position: Position,
        admits: Callable[[Problem], bool] = lambda problem: True,
    ) -> None:
        self.problems, self.reader, self.limit, self.seed = problems, reader, limit, seed
        self.position = position
        self.admits = admits
        self._order: tuple[int, Tensor] | None = None

    def questions(self, count: int, drawn: int = 0) -> Questions:
        """Advances by `count` problems and returns this rank's share. Every rank reads all `count` prompts, because the
        position depends on which ones are too long or left out.

        Args:
            count: Number of problems, over all ranks.
            drawn: Number of problems that the current epoch already has, over all ranks; 0 begins the next epoch.

        Raises:
            ConfigError: If too many consecutive prompts are too long, or the task leaves out all of them.
        """
        position, problems, prompts, missed, unwanted = self.position, list[Problem](), list[list[int]](), 0, 0
        while len(problems) < count:
            if missed >= min(len(self.problems), MOST_MISSES):
                raise ConfigError(
                    f"data.max_prompt_tokens is {self.limit}, but {missed} consecutive prompts were longer; "
                    "raise it or shorten the prompts"
                )
            if unwanted >= len(self.problems):
                raise ConfigError(f"data.task: its `admits` leaves out all {unwanted} problems; it has to admit some")
            problem = self.problems[self._row(position.cursor)]
            position.cursor += 1
            if not self.admits(problem):
                unwanted += 1
                continue
            unwanted = 0
            ids = self.reader.tokens_within(problem, self.limit)
            if ids is None:
                position.overlong, missed = position.overlong + 1, missed + 1
            else:
                problems.append(problem)
                prompts.append(ids)
                missed = 0
        position.epochs += drawn == 0
        epoch, own = position.epochs - 1, range(rank(), count, world_size())
        seeds = [derive_seed(self.seed, "rollouts", epoch, drawn + i) for i in own]
        indices = range(drawn + rank(), drawn + count, world_size())
        return Questions(epoch, [problems[i] for i in own], [prompts[i] for i in own], seeds, indices)

    def __iter__(self) -> Iterator[Problem]:
        """The problems in the order of the first pass over the data."""
        return (self.problems[self._row(i)] for i in range(len(self.problems)))

    def _row(self, cursor: int) -> int:
        """The row at a position of the stream; each pass over the data is shuffled differently."""
        round_, offset = divmod(cursor, len(self.problems))
        if self._order is None or self._order[0] != round_:
            shuffle = generator(self.seed, "prompts", round_)
            self._order = round_, torch.randperm(len(self.problems), generator=shuffle)
        return int(self._order[1][offset])
