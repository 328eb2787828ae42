"""One epoch, from prompts to micro-batches: draw -> judge -> score -> assign_credit -> pack.

Stages take what they need (policy, teacher, method, engine, settings), never a trainer. `record.py` describes the data
that they pass on. Communication between ranks goes through `runtime/ranks.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlrt_lightning.epoch.batch import Batches, MicroBatch, micro_batches, mini_batch_sizes
from rlrt_lightning.epoch.checks import scoring_engine
from rlrt_lightning.epoch.numerics import first_non_finite, log_probs, non_finite_log_probs
from rlrt_lightning.epoch.record import Drawn, EpochRecord, Judged, Questions, Scored
from rlrt_lightning.objective import Aggregation, Importance, Method, Signals, group_advantages, importance_weights
from rlrt_lightning.policy.model import Policy
from rlrt_lightning.policy.padding import pad_rows
from rlrt_lightning.policy.work import Work
from rlrt_lightning.rollouts import Rollout, RolloutEngine, Sampling
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.progress import Progress
from rlrt_lightning.runtime.ranks import gather, rank, sum_over_ranks, world_size
from rlrt_lightning.tasks import Problem, Verdict
from rlrt_lightning.teacher import Teacher, TeacherScore

log = logging.getLogger(__name__)

Verify = Callable[[Problem, str], "Future[Verdict]"]
"""Submits a completion to the verifier, which judges it in the background."""

Phase = Callable[[str], AbstractContextManager[None]]
"""Context manager of a named phase: times it, and lets a run that was asked to stop end within it."""


@dataclass(frozen=True)
class Parts:
    """The components that make an epoch.

    Args:
        policy: The model being trained.
        teacher: Scores the rollouts for which the method uses a teacher.
        method: The method as of the epoch's first optimizer step.
        engine: Generates the rollouts, and scores for the teacher if `Teacher.scored_by` is "engine".
    """

    policy: Policy
    teacher: Teacher
    method: Method
    engine: RolloutEngine


@dataclass(frozen=True)
class EpochSettings:
    """Settings of an epoch, with the same names as on the command line."""

    sampling: Sampling
    rollouts_per_prompt: int
    minibatches: int
    accumulate_grad_batches: int
    tokens_per_pass: int | None
    rescore: bool
    max_fault_share: float
    importance: Importance
    importance_cap: float
    aggregation: Aggregation
    seed: int


def draw(
    questions: Questions, engine: RolloutEngine, verify: Verify, rollouts: int, sampling: Sampling
) -> Iterator[Drawn]:
    """Yields rollouts as they finish. Each is submitted to the verifier immediately, so that verification overlaps with
    sampling."""
    for rollout in engine.generate(questions.prompts, rollouts, sampling, questions.seeds):
        yield rollout, verify(questions.problems[rollout.group], rollout.text)


def collect_verdicts(
    problems: Sequence[Problem], drawn: Iterable[Drawn], max_fault_share: float, progress: Progress
) -> list[Rollout]:
    """Waits for the verdicts and returns the rollouts with them, ordered by problem.

    Raises:
        ConfigError: If the verifier itself failed on more than `max_fault_share` of the rollouts.
    """
    rollouts, faults = [], []
    pairs = sorted(drawn, key=lambda pair: (pair[0].group, pair[0].index))
    for rollout, pending in progress("verdicts", pairs, len(pairs)):
        rollout.verdict = pending.result()
        rollouts.append(rollout)
        if rollout.verdict.fault:
            faults.append(f"{problems[rollout.group].id}: {rollout.verdict.message}")
    if faults:
        log.warning("the verifier failed on %d of %d rollouts; the first: %s", len(faults), len(rollouts), faults[0])
    if len(faults) > max_fault_share * len(rollouts):
        raise ConfigError(
            f"the verifier failed on {len(faults)} of {len(rollouts)} rollouts, more than data.max_fault_share "
            f"({max_fault_share}) allows; the first: {faults[0]}"
        )
    return rollouts


def judge(questions: Questions, rollouts: list[Rollout], method: Method) -> Judged:
    """Computes rewards and group advantages from the verdicts."""
    rewards = torch.tensor([r.verdict.reward for r in rollouts if r.verdict])
    groups = torch.tensor([r.group for r in rollouts])
    shaped = method.shape_rewards(rewards, groups, [r.text for r in rollouts])
    return Judged(
        questions=questions,
        rollouts=rollouts,
        groups=groups,
        rewards=rewards,
        shaped_rewards=shaped,
        advantages=group_advantages(shaped, groups, method.normalize_std),
        mask=pad_rows([torch.ones(len(r.response_ids)) for r in rollouts]).bool(),
    )


def score(judged: Judged, parts: Parts, settings: EpochSettings, phase: Phase) -> Scored:
    """Computes the policy's log-probs (with `data.rescore`) and the teacher's log-probs for the rollouts that need
    them. The advantages of rollouts with non-finite log-probs are set to 0."""
    wanted = parts.method.uses_teacher(judged.advantages, judged.rewards) & judged.nonempty
    trainable = parts.method.may_train(judged.advantages, judged.rewards) & judged.nonempty
    with phase("rescore"):
        if settings.rescore:
            rescore(judged, trainable, parts.policy, settings.sampling)
    faults = non_finite_log_probs(judged.rollouts)
    unusable = torch.tensor([i in faults for i in range(len(judged.rollouts))])
    logp_sampler, logp_old, rescored = log_probs(judged.rollouts, unusable)
    with phase("teacher"):
        contexts, teacher, truncated = teacher_scores(judged, wanted & ~unusable, ~unusable, parts, settings)
    for i, found in enumerate(teacher):
        if found is not None and (wrong := first_non_finite(vars(found))):
            faults[i], contexts[i], teacher[i] = f"the teacher's {wrong}", None, None
    scored = Scored(
        **vars(judged),
        logp_sampler=logp_sampler,
        logp_old=logp_old,
        logp_student=logp_sampler if parts.teacher.scored_by == "engine" else logp_old,
        logp_teacher=pad_rows([s.logp if s else None for s in teacher], width=judged.mask.shape[1]),
        trainable=trainable,
        rescored=rescored,
        contexts=contexts,
        teacher=teacher,
        contexts_truncated=truncated,
        unusable=unusable,
        faults=faults,
    )
    scored.advantages = judged.advantages.masked_fill(unusable, 0.0)
    return scored


def teacher_scores(
    judged: Judged, wanted: Tensor, usable: Tensor, parts: Parts, settings: EpochSettings
) -> tuple[list[str | None], list[TeacherScore | None], int]:
    """Has the teacher score the wanted rollouts.

    Args:
        judged: N rollouts.
        wanted: True for rollouts to score, bool [N].
        usable: True for rollouts that may serve as demonstrations, bool [N].
        parts: The epoch's components.
        settings: See `EpochSettings`.

    Returns:
        The contexts and scores of the N rollouts, None for those that were not scored, and the number of contexts that
        were truncated or did not fit.
    """
    policy, method, questions = parts.policy, parts.method, judged.questions
    contexts = parts.teacher.contexts(
        method.context,
        judged.problems,
        judged.rollouts,
        method.successful(judged.rewards) & usable,
        settings.seed,
        questions.epoch,
        0,
        indices=questions.indices,
        policy=policy,
    )
    scores, truncated = parts.teacher.score(
        policy,
        judged.problems,
        judged.rollouts,
        [context if want else None for context, want in zip(contexts, wanted.tolist(), strict=True)],
        settings.sampling.temperature,
        method.context,
        top_k=method.needs.top_k,
        engine=scoring_engine(parts.teacher, method, parts.engine, settings.sampling),
    )
    shown = [None if found is None else context for context, found in zip(contexts, scores, strict=True)]
    return shown, scores, truncated


def rescore(judged: Judged, needed: Tensor, policy: Policy, sampling: Sampling) -> None:
    """Computes `Rollout.logp_policy` of the rollouts selected by `needed`, bool [N]."""
    chosen = [r for r, need in zip(judged.rollouts, needed.tolist(), strict=True) if need]
    scores = policy.score([(r.prompt_ids, r.response_ids) for r in chosen], sampling.temperature)
    for rollout, logp in zip(chosen, scores, strict=True):
        rollout.logp_policy = logp


def assign_credit(scored: Scored, method: Method, settings: EpochSettings) -> EpochRecord:
    """Computes the method's token credit. Rollouts with non-finite log-probs of policy or sampler get no credit but
    count in the mean over the mini-batch; those with non-finite log-probs of the teacher count as not scored.

    Raises:
        ConfigError: If the method trains on rollouts that `data.rescore` has skipped because of its `may_train`.
    """
    credit = method.credit(
        Signals(
            advantages=scored.advantages,
            rewards=scored.rewards,
            logp_student=scored.logp_student,
            logp_teacher=scored.logp_teacher,
            mask=scored.mask,
            has_context=scored.has_context,
            teacher_entropy=_teacher_entropy(scored) if method.needs.entropy else None,
            sum_over_ranks=sum_over_ranks,
        )
    )
    credit = credit.without(scored.unusable)
    if settings.rescore and (credit.trains & ~scored.trainable).any():
        raise ConfigError(
            f"model.method: {type(method).__name__} trains on rollouts that its may_train excludes, so data.rescore "
            "has not recomputed their log-probs; override may_train"
        )
    importance = importance_weights(
        scored.logp_old, scored.logp_sampler, scored.mask, settings.importance, settings.importance_cap
    )
    return EpochRecord(**vars(scored), importance=importance, credit=credit)


def _teacher_entropy(scored: Scored) -> Tensor:
    return pad_rows([found.entropy if found else None for found in scored.teacher], width=scored.mask.shape[1])


def pack(record: EpochRecord, settings: EpochSettings, sharing: Work | None) -> Batches[MicroBatch]:
    """Splits the record into micro-batches, in the order of the optimizer steps."""
    return micro_batches(
        record,
        settings.minibatches,
        settings.accumulate_grad_batches,
        settings.aggregation,
        settings.sampling.temperature,
        world_size(),
        sum_over_ranks(mini_batch_sizes(record, settings.minibatches)),
        gather,
        sharing,
        (settings.seed, "training", record.questions.epoch, rank()),
        settings.tokens_per_pass,
    )


def make_epoch(
    questions: Questions,
    drawn: Callable[[], list[Drawn]],
    parts: Parts,
    settings: EpochSettings,
    phase: Phase,
    progress: Progress,
) -> tuple[EpochRecord, Batches[MicroBatch]]:
    """Runs all stages of one epoch.

    Args:
        questions: The epoch's problems and prompts.
        drawn: Returns the rollouts: new ones (`draw`), those generated ahead, or those from a checkpoint.
        parts: The epoch's components.
        settings: See `EpochSettings`.
        phase: Context manager of each phase.
        progress: Displays the progress of a phase.
    """
    with phase("rollout"):
        pairs = drawn()
    with phase("verify"):
        rollouts = collect_verdicts(questions.problems, pairs, settings.max_fault_share, progress)
    with phase("advantages"):
        judged = judge(questions, rollouts, parts.method)
    with progress.phase("scoring") as advance, parts.policy.counter.reporting(partial(advance, 0)):
        scored = score(judged, parts, settings, phase)
    record = assign_credit(scored, parts.method, settings)
    return record, pack(record, settings, parts.policy.work if parts.policy.shares_prompts else None)
