"""What the teacher sees besides the prompt: templates, and the choice of demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rlrt_lightning.objective.methods import Context

_SOLVE = "\n\nNow solve the problem yourself, step by step."
_SOLUTION = "{prompt}\n\nHere is a correct solution to this problem:\n\n{context}" + _SOLVE

TEMPLATES: dict[Context, str] = {
    "sibling": _SOLUTION,
    "solution": _SOLUTION,
    "answer": "{prompt}\n\nThe correct answer to this problem is: {context}" + _SOLVE,
    "feedback": "{prompt}\n\nThis is feedback on an earlier attempt at this problem:\n\n{context}" + _SOLVE,
    "sibling_or_solution": _SOLUTION,
}
"""The default template of each kind of context."""

VERDICTS = ("\n\nYour answer is incorrect.", "\n\nYour answer is correct.")
"""The remarks on a failed and on a successful rollout (`Needs.remark`)."""

FEEDBACK = "\n\nThis is feedback on your own attempt at this problem:\n\n"
"""Precedes the verifier's message as a remark."""


class Shown(NamedTuple):
    """What the teacher sees besides the prompt.

    Args:
        context: The privileged context.
        kind: The kind of context.
        remark: Text about the scored rollout itself. It follows the template, so that rollouts with different remarks
            share the forward pass of the context.
    """

    context: str
    kind: Context
    remark: str = ""

    def __str__(self) -> str:
        return self.context + self.remark


def assign(
    demonstrations: Sequence[int], members: Sequence[int], fitness: Callable[[int, int], int], count: int
) -> dict[int, list[int]]:
    """Assigns demonstrations to each member of a group: never itself, otherwise the fittest, and among these the ones
    that fit most members, so that few demonstrations are read.

    Args:
        demonstrations: Indices of the demonstrations; the order breaks ties.
        members: Indices of the group's rollouts.
        fitness: How well the first rollout serves as a demonstration for the second; 2 if it is shown whole.
        count: Largest number of demonstrations for a member.

    Returns:
        The demonstrations of each member, the best first.
    """
    fit = {(d, m): fitness(d, m) for d in demonstrations for m in members if d != m}
    served = {d: sum(fit.get((d, m), 0) == 2 for m in members) for d in demonstrations}
    assigned = {}
    for m in members:
        others = [d for d in demonstrations if d != m]
        assigned[m] = sorted(others, key=lambda d: (fit[d, m], served[d]), reverse=True)[:count]
    return assigned
