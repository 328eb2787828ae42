"""The data of one epoch: a record to which each stage adds fields.

The stages in `make.py`: `judge` returns `Judged`, `score` returns `Scored`, `assign_credit` returns `EpochRecord`.

Sizes: P problems on this rank with K rollouts each, N = P * K rollouts ordered by problem, T tokens in the longest
response. Tokens have two layouts:

| layout | shape | contents of a row | used by |
| --- | --- | --- | --- |
| by response | [N, T] | the tokens of one response, starting at column 0, padded with 0 | this record |
| by sequence | [B, S] | prompt and response, padded on the right | `MicroBatch` |

Log-probs of the sampled tokens, in nats, by response:

| name | source |
| --- | --- |
| `logp_sampler` | the engine that sampled the tokens |
| `logp_policy` | the trainer's forward pass with the weights that sampled them; only with `data.rescore` |
| `logp_old` | denominator of the surrogate's ratio: `logp_policy` if available, otherwise `logp_sampler` |
| `logp_student` | P_S in D_t = log P_S - log P_T, computed by the same program as the teacher's |
| `logp_teacher` | P_T, the teacher with its context |
| `logp_reference` | the policy's initial weights; only with `model.reference_kl` |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlrt_lightning.objective import Credit
from rlrt_lightning.rollouts import Rollout
from rlrt_lightning.tasks import Problem, Verdict
from rlrt_lightning.teacher import TeacherScore

Drawn = tuple[Rollout, "Future[Verdict]"]
"""A rollout and its verdict, which may be pending."""

Verify = Callable[[Problem, str], "Future[Verdict]"]
"""Submits a completion to the verifier, which judges it in the background."""


@dataclass(frozen=True)
class Questions:
    """This rank's problems in an epoch.

    Args:
        epoch: Number of the epoch.
        problems: P problems.
        prompts: Token ids of their prompts.
        seeds: A seed for the rollouts of each problem.
        indices: Index of each problem among the epoch's problems of all ranks.
    """

    epoch: int
    problems: list[Problem]
    prompts: list[list[int]]
    seeds: list[int]
    indices: Sequence[int]


@dataclass(kw_only=True)
class Judged:
    """Rollouts with their verdicts and group advantages.

    Args:
        questions: The epoch's problems and prompts.
        rollouts: N rollouts, ordered by problem.
        groups: Problem index of each rollout, [N].
        rewards: The verifier's rewards, float32 [N].
        shaped_rewards: The rewards from which the advantages are computed, after `Method.shape_rewards`, [N].
        advantages: Group advantages A, [N].
        mask: True at response tokens, [N, T].
        drawn: Metrics of all rollouts that this rank has drawn, by tag; with dynamic sampling the epoch has only some
            of them.
    """

    questions: Questions
    rollouts: list[Rollout]
    groups: Tensor
    rewards: Tensor
    shaped_rewards: Tensor
    advantages: Tensor
    mask: Tensor
    drawn: dict[str, float] = field(default_factory=dict)

    @property
    def problems(self) -> list[Problem]:
        """The P problems, indexed by `Rollout.group`."""
        return self.questions.problems

    @property
    def correct(self) -> Tensor:
        """True for rollouts with a correct verdict, bool [N]."""
        return torch.tensor([r.verdict is not None and r.verdict.correct for r in self.rollouts])

    @property
    def truncated(self) -> Tensor:
        """True for responses that reached the maximum length without an end, bool [N]."""
        return torch.tensor([r.truncated for r in self.rollouts])

    @property
    def nonempty(self) -> Tensor:
        """True for responses with tokens, bool [N]. Empty ones count in rewards and advantages but have no gradient."""
        return self.mask.any(-1)


@dataclass(kw_only=True)
class Scored(Judged):
    """Judged rollouts with the log-probs of policy and teacher. Advantages of unusable rollouts are 0.

    Args:
        logp_sampler: See the table above, [N, T].
        logp_old: [N, T].
        logp_student: [N, T].
        logp_teacher: [N, T]; 0 for rollouts that the teacher did not score.
        trainable: True for rollouts that may get a gradient, bool [N].
        rescored: True for rollouts with `logp_policy`, bool [N].
        contexts: The teacher's context for each of the N rollouts; None if it was not scored.
        teacher: The teacher's scores of each of the N rollouts; None if it was not scored.
        contexts_truncated: Number of contexts that were truncated or did not fit.
        unusable: True for rollouts with non-finite log-probs of sampler, policy or reference, which get no gradient,
            bool [N].
        faults: Indices and descriptions of rollouts with non-finite log-probs of sampler, policy, reference or teacher.
        logp_reference: See the table above, [N, T]; 0 for rollouts without a gradient. None without a reference.
        logp_teacher_wrong: See `Signals`, [N, C, T]; None unless the method needs it.
        wrong_valid: See `Signals`, bool [N, C]; None unless the method needs it.
        thoughts: See `Signals`, bool [N, T]; None unless the method needs it.
        gate_open: Whether the method's gate is open; true without a gate.
        gate_metrics: Metrics of the gate's step in this epoch, by tag.
    """

    logp_sampler: Tensor
    logp_old: Tensor
    logp_student: Tensor
    logp_teacher: Tensor
    trainable: Tensor
    rescored: Tensor
    contexts: list[str | None]
    teacher: list[TeacherScore | None]
    contexts_truncated: int
    unusable: Tensor
    faults: dict[int, str]
    logp_reference: Tensor | None = None
    logp_teacher_wrong: Tensor | None = None
    wrong_valid: Tensor | None = None
    thoughts: Tensor | None = None
    gate_open: bool = True
    gate_metrics: dict[str, float] = field(default_factory=dict)

    @property
    def has_context(self) -> Tensor:
        """True for rollouts that the teacher scored, bool [N]."""
        return torch.tensor([context is not None for context in self.contexts])


@dataclass(kw_only=True)
class EpochRecord(Scored):
    """The complete record of an epoch before its first update.

    Args:
        importance: Token weights that correct for numerical differences between sampler and trainer, [N, T].
        credit: The method's token credit, [N, T].
    """

    importance: Tensor
    credit: Credit

    @property
    def counted(self) -> Tensor:
        """True for rollouts that count in the mean over the mini-batch, bool [N]."""
        return torch.ones(len(self.rollouts), dtype=torch.bool) if self.credit.counted is None else self.credit.counted

    @property
    def trains(self) -> Tensor:
        """True for rollouts that have a gradient, bool [N]: of the method's loss, or of the KL divergence to the
        reference, which all counted rollouts have."""
        if self.logp_reference is None:
            return self.credit.trains
        return self.credit.trains | (self.counted & self.trainable & ~self.unusable)
