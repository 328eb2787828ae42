"""Held-out problems, and their rollouts as batches of finished work."""

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
    """Held-out problems that the policy is evaluated on.

    Args:
        task: Whose held-out problems; null takes those of the training task.
        samples: Rollouts of each problem, the n of avg@n and pass@k.
        limit: Take only this many problems, the first ones; null takes all.
        sampling: How they are drawn; null draws as in training.
    """

    task: Task | None = None
    samples: int = 8
    limit: int | None = None
    sampling: Sampling | None = None


class Evaluated:
    """Some problems of an evaluation set with their rollouts, verdicts included; `Rollout.group` counts the problems.

    Not a dataclass: Lightning takes those apart, looking for tensors to move.
    """

    def __init__(self, benchmark: str, samples: int, problems: list[Problem], rollouts: list[Rollout]) -> None:
        self.benchmark, self.samples, self.problems, self.rollouts = benchmark, samples, problems, rollouts


Draw = Callable[[Sequence[int]], list[Rollout]]
"""Rollouts with verdicts of the problems with these numbers, ordered by problem."""


class EvaluationLoader:
    """An evaluation set as a data loader whose batches are drawn and judged as they are asked for.

    Args:
        name: Name of the set.
        samples: Rollouts of each problem.
        problems: All problems, over all ranks.
        size: Problems in a batch.
        finished: Names of the problems whose results are known already; may change until the loader is read.
        draw: Draws their rollouts.
    """

    def __init__(
        self, name: str, samples: int, problems: Sequence[Problem], size: int, finished: set[str], draw: Draw
    ) -> None:
        self.name, self.samples, self.problems, self.finished, self.draw = name, samples, problems, finished, draw
        mine = list(range(rank(), len(problems), world_size()))
        # All ranks take as many batches, or one would wait for the others for ever; the last may be empty.
        starts = range(0, -(-len(problems) // world_size()), size)
        self.batches = [mine[start : start + size] for start in starts]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Evaluated]:
        for numbers in self.batches:
            left = [i for i in numbers if self.problems[i].id not in self.finished]
            wanted = any(gather(bool(left)))  # ranks may share an engine, or each other's weights
            rollouts = self.draw(left) if wanted else []
            yield Evaluated(self.name, self.samples, [self.problems[i] for i in left], rollouts)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: an evaluation that was interrupted begins anew, or goes on from its files."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""


def read_set(where: str, spec: Benchmark, task: Task, reader: PromptReader) -> Sequence[Problem]:
    """The problems of an evaluation set, checked as far as they can be before anything is drawn.

    Args:
        where: The setting that holds it.
        spec: The set.
        task: The training task, for a set that names none.
        reader: Makes prompts tokens.

    Raises:
        ConfigError: If there are none, or a setting is wrong.
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
        limit = "the longest prompt of the model"
        reader.check_lengths(where, problems, limit, positions - 1, "they count like the others")
    reader.check_embeddings(problems)
    if spec.sampling is not None:
        Stops.of(reader.policy, spec.sampling, f"{where}.sampling")
    return problems
