"""The rollouts of an epoch: one round of prompts, or with dynamic sampling as many as it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rlrt_lightning.epoch.metrics import rollout_metrics
from rlrt_lightning.epoch.record import Drawn, Questions
from rlrt_lightning.rollouts import Rollout
from rlrt_lightning.runtime.ranks import gather, rank, world_size
from rlrt_lightning.tasks import Problem

Observe = Callable[[Sequence[Problem], Sequence[Sequence[float]]], None]
"""Takes the problems of a whole epoch and the rewards of each one's rollouts; see `Task.observe`."""


@dataclass(frozen=True)
class Source:
    """Where an epoch's rollouts come from.

    Args:
        questions: Returns this rank's next problems. Takes the number of problems that all ranks have drawn in this
            epoch; 0 begins the epoch.
        draw: Returns the rollouts of problems: new ones, those generated ahead, or those from a checkpoint.
        observe: Gets the rewards of all groups that were drawn; None if the task does not use them.
    """

    questions: Callable[[int], Questions]
    draw: Callable[[Questions], list[Drawn]]
    observe: Observe | None = None


@dataclass
class Group:
    """A problem with its K rollouts.

    Args:
        index: Index of the problem among those drawn in this epoch by all ranks.
        problem: The problem.
        prompt: Token ids of its prompt.
        seed: Seed of its rollouts.
        rollouts: The rollouts, with verdicts.
    """

    index: int
    problem: Problem
    prompt: list[int]
    seed: int
    rollouts: list[Rollout]

    @property
    def rewards(self) -> list[float]:
        """The verifier's rewards."""
        return [r.verdict.reward for r in self.rollouts if r.verdict is not None]

    @property
    def mixed(self) -> bool:
        """Whether the rewards differ; other groups have no advantage."""
        return len(set(self.rewards)) > 1


def draw_rounds(
    source: Source, judged: Callable[[Questions], list[Rollout]], rounds: int
) -> tuple[Questions, list[Rollout], dict[str, float]]:
    """Draws an epoch's rollouts. With dynamic sampling (DAPO, arXiv:2503.14476), rounds of equal size are drawn until
    there are as many mixed groups as a round has problems. The first of them are used, in the order of the problems; if
    there are too few, the first other groups fill the epoch.

    The result does not depend on the number of ranks: groups are distributed again, like the problems of one round.

    Args:
        source: Provides the problems, and gets the rewards.
        judged: Returns the rollouts of problems with verdicts, ordered by problem.
        rounds: Maximum number of rounds; 1 for no dynamic sampling.

    Returns:
        This rank's problems, their rollouts, and the metrics of all rollouts that this rank has drawn.
    """
    questions = source.questions(0)
    groups, done = _groups(questions, judged(questions)), 1
    size = sum(gather(len(groups))) if rounds > 1 else 0
    while done < rounds and len(_indices(groups, mixed=True)) < size:
        more = source.questions(done * size)
        groups += _groups(more, judged(more))
        done += 1
    if source.observe is not None:
        own = [(g.index, g.problem, g.rewards) for g in groups]
        every = sorted((seen for ranks in gather(own) for seen in ranks), key=lambda seen: seen[0])
        source.observe([problem for _, problem, _ in every], [rewards for *_, rewards in every])
    metrics = _metrics(groups)
    if rounds > 1:
        mixed = _indices(groups, mixed=True)[:size]
        chosen = sorted([*mixed, *_indices(groups, mixed=False)[: size - len(mixed)]])
        metrics |= {"groups/rounds": done, "groups/drawn": done * size, "groups/missing": size - len(mixed)}
        groups = _distributed(groups, chosen)
    return _joined(groups, questions.epoch), _rollouts(groups), metrics


def _groups(questions: Questions, rollouts: Sequence[Rollout]) -> list[Group]:
    fields = zip(questions.indices, questions.problems, questions.prompts, questions.seeds, strict=True)
    groups = [Group(*values, rollouts=[]) for values in fields]
    for rollout in rollouts:
        groups[rollout.group].rollouts.append(rollout)
    return groups


def _gathered(groups: Sequence[Group]) -> list[Group]:
    return [group for own in gather(list(groups)) for group in own]


def _indices(groups: Sequence[Group], mixed: bool) -> list[int]:
    """Indices of all ranks' groups that are mixed, or that are not, in increasing order."""
    return sorted(i for own in gather([g.index for g in groups if g.mixed == mixed]) for i in own)


def _distributed(groups: Sequence[Group], chosen: Sequence[int]) -> list[Group]:
    """This rank's share of the chosen groups; only groups that another rank has drawn are sent."""
    owner = {index: position % world_size() for position, index in enumerate(chosen)}
    kept = [group for group in groups if owner.get(group.index) == rank()]
    sent = [group for group in groups if owner.get(group.index, rank()) != rank()]
    received = [group for group in _gathered(sent) if owner[group.index] == rank()]
    return sorted([*kept, *received], key=lambda group: group.index)


def _joined(groups: Sequence[Group], epoch: int) -> Questions:
    return Questions(
        epoch,
        problems=[g.problem for g in groups],
        prompts=[g.prompt for g in groups],
        seeds=[g.seed for g in groups],
        indices=[g.index for g in groups],
    )


def _rollouts(groups: Sequence[Group]) -> list[Rollout]:
    """The groups' rollouts in order, numbered by the groups' positions."""
    for position, group in enumerate(groups):
        for rollout in group.rollouts:
            rollout.group = position
    return [rollout for group in groups for rollout in group.rollouts]


def _metrics(groups: Sequence[Group]) -> dict[str, float]:
    rollouts = _rollouts(groups)
    rewards = torch.tensor([reward for group in groups for reward in group.rewards])
    return rollout_metrics(rollouts, rewards, torch.tensor([rollout.group for rollout in rollouts]))
