"""Evaluation sets, and loaders that yield them with rollouts and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlrt_lightning.epoch.prompts import PromptReader, read_problems
from rlrt_lightning.rollouts import Rollout, Sampling
from rlrt_lightning.rollouts.base import Stops
from rlrt_lightning.runtime.errors import ConfigError, check_ranges
from rlrt_lightning.runtime.ranks import gather, rank, world_size
from rlrt_lightning.tasks import Problem, Task


@dataclass
class Benchmark:
    """An evaluation set: the held-out problems of a task.

    Args:
        task: The task; null uses the training task.
        samples: Number of rollouts per problem, the n of avg@n and pass@k.
        limit: Use only the first `limit` problems; null uses all.
        sampling: Sampling parameters; null uses those of training.
    """

    task: Task | None = None
    samples: int = 8
    limit: int | None = None
    sampling: Sampling | None = None


class Evaluated:
    """A batch of problems from an evaluation set, with rollouts and verdicts; `Rollout.group` indexes the problems.

    Not a dataclass, because Lightning traverses those to move tensors.
    """

    def __init__(self, benchmark: str, samples: int, problems: list[Problem], rollouts: list[Rollout]) -> None:
        self.benchmark, self.samples, self.problems, self.rollouts = benchmark, samples, problems, rollouts


Draw = Callable[[Sequence[int]], list[Rollout]]
"""Generates rollouts with verdicts for the problems with the given indices, ordered by problem."""


class EvaluationLoader:
    """A data loader over an evaluation set that generates and judges the rollouts of each batch on demand.

    Args:
        name: Name of the set.
        samples: Number of rollouts per problem.
        problems: All problems, over all ranks.
        size: Number of problems in a batch.
        finished: Ids of problems that are already evaluated; may change until the loader is iterated.
        draw: Generates the rollouts.
    """

    def __init__(
        self, name: str, samples: int, problems: Sequence[Problem], size: int, finished: set[str], draw: Draw
    ) -> None:
        self.name, self.samples, self.problems, self.finished, self.draw = name, samples, problems, finished, draw
        mine = list(range(rank(), len(problems), world_size()))
        # All ranks need the same number of batches, or collectives would hang; the last batch may be empty.
        starts = range(0, -(-len(problems) // world_size()), size)
        self.batches = [mine[start : start + size] for start in starts]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Evaluated]:
        for numbers in self.batches:
            remaining = [i for i in numbers if self.problems[i].id not in self.finished]
            wanted = any(gather(bool(remaining)))  # `draw` is collective: ranks may share an engine or sharded weights
            rollouts = self.draw(remaining) if wanted else []
            yield Evaluated(self.name, self.samples, [self.problems[i] for i in remaining], rollouts)

    def state_dict(self) -> dict[str, Any]:
        """Empty: an interrupted evaluation restarts, or is resumed from its result files."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""


def read_set(where: str, spec: Benchmark, task: Task, reader: PromptReader) -> Sequence[Problem]:
    """Reads and checks the problems of an evaluation set before any rollouts are generated.

    Args:
        where: Name of the setting, for messages.
        spec: The evaluation set.
        task: The training task, used if the set has no task.
        reader: Tokenizes the prompts.

    Raises:
        ConfigError: If there are no problems, or a setting is wrong.
    """
    ranges = {
        "samples": (spec.samples, spec.samples >= 1, "at least 1"),
        "limit": (spec.limit, spec.limit is None or spec.limit >= 1, "at least 1, or null"),
    }
    check_ranges(where, ranges)
    problems = read_problems(spec.task or task, "heldout", where)
    if not len(problems):
        raise ConfigError(f"{where}: there are no problems to evaluate on")
    problems = problems[: spec.limit] if spec.limit is not None else problems
    positions = reader.policy.max_positions
    if positions is not None:
        limit = "the model's maximum prompt length"
        reader.check_lengths(where, problems, limit, positions - 1, "they are evaluated like the others")
    reader.check_embeddings(problems)
    if spec.sampling is not None:
        Stops.of(reader.policy, spec.sampling, f"{where}.sampling")
    return problems
