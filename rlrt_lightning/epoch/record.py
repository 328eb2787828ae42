"""One epoch of rollouts as data: a record that grows from stage to stage, in which each quantity keeps one name.

`make.py` fills it: `judge` gives `Judged`, `score` gives `Scored`, `assign_credit` gives `EpochRecord`.

Sizes: P problems of this rank with K rollouts each, N = P * K rollouts ordered by problem, T tokens of the longest
response. Tokens have two layouts:

| layout | shape | a row holds | where |
| --- | --- | --- | --- |
| by response | [N, T] | the tokens of one response from column 0 on, 0 behind its end | this record |
| by sequence | [B, S] | prompt and response as the model reads them, padded on the right | `MicroBatch` |

Log-probs of the sampled tokens, in nats, by response:

| name | under |
| --- | --- |
| `logp_sampler` | the engine, as it drew the token |
| `logp_policy` | the trainer's forward pass with the same weights; only where `data.rescore` asks for it |
| `logp_old` | what the surrogate's ratio divides by: `logp_policy` where there is one, else `logp_sampler` |
| `logp_student` | P_S of D_t = log P_S - log P_T: by the same arithmetic as the teacher's |
| `logp_teacher` | P_T, the teacher with its context in view |
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from rlrt_lightning.objective import Credit
from rlrt_lightning.rollouts import Rollout
from rlrt_lightning.tasks import Problem, Verdict
from rlrt_lightning.teacher import TeacherScore

Drawn = tuple[Rollout, "Future[Verdict]"]
"""A rollout, and its verdict, which may still be under way."""


@dataclass(frozen=True)
class Questions:
    """What is asked in an epoch: this rank's share.

    Args:
        epoch: Number of the epoch.
        problems: P problems.
        prompts: Their token ids.
        seeds: A seed for the rollouts of each.
        places: The number of each problem among those of all ranks.
    """

    epoch: int
    problems: list[Problem]
    prompts: list[list[int]]
    seeds: list[int]
    places: Sequence[int]


@dataclass(kw_only=True)
class Judged:
    """Rollouts with their verdicts and group advantages.

    Args:
        questions: What was asked.
        rollouts: N rollouts, ordered by problem.
        groups: Which problem each belongs to, [N].
        rewards: The verifier's rewards, float32 [N].
        shaped_rewards: What the advantages come from; the rewards unless the method shapes them, [N].
        advantages: Group advantages A, [N].
        mask: True at response tokens, [N, T].
    """

    questions: Questions
    rollouts: list[Rollout]
    groups: Tensor
    rewards: Tensor
    shaped_rewards: Tensor
    advantages: Tensor
    mask: Tensor

    @property
    def problems(self) -> list[Problem]:
        """The problems that `Rollout.group` counts, P of them."""
        return self.questions.problems

    @property
    def correct(self) -> Tensor:
        """Which rollouts the verifier called correct: bool [N]."""
        return torch.tensor([r.verdict is not None and r.verdict.correct for r in self.rollouts])

    @property
    def nonempty(self) -> Tensor:
        """Which responses have a token. One without counts in rewards and advantages, and has no gradient: bool [N]."""
        return self.mask.any(-1)


@dataclass(kw_only=True)
class Scored(Judged):
    """Judged rollouts with the log-probs of policy and teacher. Advantages are 0 where a rollout is not usable.

    Args:
        logp_sampler: See the table above, [N, T].
        logp_old: [N, T].
        logp_student: [N, T].
        logp_teacher: [N, T]; 0 where the teacher did not score.
        trainable: Which rollouts the method says that it may train on, bool [N].
        rescored: Which rollouts have a `logp_policy`, bool [N].
        contexts: What the teacher was shown for each rollout; None where it did not score it, N of them.
        teacher: What the teacher said of each rollout; None where it did not score it, N of them.
        contexts_truncated: Contexts that were cut, or did not fit.
        unusable: Which rollouts have non-finite log-probs of sampler or policy, and therefore no gradient: bool [N].
        faults: Those, and rollouts of which the teacher said something non-finite, by position, with a description.
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

    @property
    def has_context(self) -> Tensor:
        """True where the teacher scored the rollout: bool [N]."""
        return torch.tensor([context is not None for context in self.contexts])


@dataclass(kw_only=True)
class EpochRecord(Scored):
    """Everything that is known of an epoch's rollouts before the first update.

    Args:
        importance: Weight of each token that corrects for the sampler's arithmetic, [N, T].
        credit: The method's token credit, [N, T] each.
    """

    importance: Tensor
    credit: Credit

    @property
    def counted(self) -> Tensor:
        """Which rollouts count in the mean over the mini-batch: bool [N]."""
        return torch.ones(len(self.rollouts), dtype=torch.bool) if self.credit.counted is None else self.credit.counted
