"""One epoch, from prompts to micro-batches: draw -> judge -> score -> assign_credit -> pack.

Stages take what they need (policy, teacher, method, engine, settings), never a trainer. `record.py` describes the data
that they pass on. Communication between ranks goes through `runtime/ranks.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlrt_lightning.epoch.batch import Batches, MicroBatch, micro_batches, mini_batch_sizes
from rlrt_lightning.epoch.numerics import log_probs, non_finite_log_probs, reference_log_probs
from rlrt_lightning.epoch.record import Drawn, EpochRecord, Judged, Questions, Scored, Verify
from rlrt_lightning.epoch.rounds import Source, draw_rounds
from rlrt_lightning.epoch.teaching import step_gate, teacher_scores, thought_mask, wrong_log_probs
from rlrt_lightning.objective import (
    Aggregation,
    Importance,
    Method,
    Signals,
    group_advantages,
    importance_weights,
    overlong_penalty,
)
from rlrt_lightning.objective.gate import EntropyGate
from rlrt_lightning.policy.copies import FrozenWeights
from rlrt_lightning.policy.model import Policy
from rlrt_lightning.policy.padding import pad_rows
from rlrt_lightning.policy.work import Work
from rlrt_lightning.rollouts import Rollout, RolloutEngine, Sampling
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.progress import Progress
from rlrt_lightning.runtime.ranks import gather, rank, sum_over_ranks, world_size
from rlrt_lightning.tasks import Problem
from rlrt_lightning.teacher import Teacher

log = logging.getLogger(__name__)

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
        gate: The method's gate, which the epoch steps; None if the method has none.
        reference: The weights of the KL divergence to a reference; None for no divergence.
    """

    policy: Policy
    teacher: Teacher
    method: Method
    engine: RolloutEngine
    gate: EntropyGate | None = None
    reference: FrozenWeights | None = None


@dataclass(frozen=True)
class EpochSettings:
    """Settings of an epoch, with the same names as on the command line."""

    sampling: Sampling
    rollouts_per_prompt: int
    sampling_rounds: int
    minibatches: int
    accumulate_grad_batches: int
    tokens_per_pass: int | None
    rescore: bool
    max_fault_share: float
    importance: Importance
    importance_cap: float
    aggregation: Aggregation
    mask_truncated: bool
    overlong_buffer: int | None
    seed: int

    @classmethod
    def of(cls, data: Any, module: Any, accumulate_grad_batches: int) -> EpochSettings:
        """The settings of a `RolloutDataModule` and an `RLRTModule`."""
        names = [field.name for field in fields(cls) if field.name != "accumulate_grad_batches"]
        given = {name: getattr(data if hasattr(data, name) else module, name) for name in names}
        return cls(accumulate_grad_batches=accumulate_grad_batches, **given)


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


def judge(
    questions: Questions, rollouts: list[Rollout], drawn: dict[str, float], method: Method, settings: EpochSettings
) -> Judged:
    """Computes rewards and group advantages from the verdicts."""
    rewards = torch.tensor([r.verdict.reward for r in rollouts if r.verdict])
    groups = torch.tensor([r.group for r in rollouts])
    shaped = method.shape_rewards(rewards, groups, [r.text for r in rollouts])
    if settings.overlong_buffer is not None:
        lengths = torch.tensor([len(r.response_ids) for r in rollouts])
        penalty = overlong_penalty(lengths, settings.sampling.max_new_tokens, settings.overlong_buffer)
        shaped = shaped + penalty.to(shaped)
    return Judged(
        questions=questions,
        rollouts=rollouts,
        groups=groups,
        rewards=rewards,
        shaped_rewards=shaped,
        advantages=group_advantages(shaped, groups, method.normalize_std),
        mask=pad_rows([torch.ones(len(r.response_ids)) for r in rollouts]).bool(),
        drawn=drawn,
    )


def score(judged: Judged, parts: Parts, settings: EpochSettings, phase: Phase, every: bool = False) -> Scored:
    """Computes the log-probs of the policy (with `data.rescore`), the reference (with `model.reference_kl`) and the
    teacher for the rollouts that need them. The advantages of rollouts with non-finite log-probs are set to 0.

    Args:
        judged: The rollouts.
        parts: The epoch's components.
        settings: See `EpochSettings`.
        phase: Context manager of each phase.
        every: Whether all rollouts need them, as in an evaluation of the teacher, and not only those that the method
            uses.
    """
    kept = judged.nonempty & ~judged.truncated if settings.mask_truncated else judged.nonempty
    wanted = kept & (parts.method.uses_teacher(judged.advantages, judged.rewards) | every)
    may_train = parts.method.may_train(judged.advantages, judged.rewards) | (parts.reference is not None)
    trainable = kept & (may_train | every)
    with phase("rescore"):
        if settings.rescore:
            rescore(judged, trainable, parts.policy, settings.sampling)
    if parts.reference is not None:
        with phase("reference"):
            score_by_reference(judged, trainable, parts.policy, parts.reference, settings.sampling)
    faults = non_finite_log_probs(judged.rollouts)
    unusable = torch.tensor([i in faults for i in range(len(judged.rollouts))])
    logp_sampler, logp_old, rescored = log_probs(judged.rollouts, unusable)
    with phase("teacher"):
        taught = teacher_scores(judged, wanted & ~unusable, ~unusable, parts, settings)
    needs, width = parts.method.needs, judged.mask.shape[1]
    wrong = wrong_log_probs(taught.wrong, width) if needs.wrong_siblings else (None, None)
    scored = Scored(
        **vars(judged),
        logp_sampler=logp_sampler,
        logp_old=logp_old,
        logp_student=logp_sampler if parts.teacher.scored_by == "engine" else logp_old,
        logp_teacher=pad_rows([s.logp if s else None for s in taught.scores], width),
        trainable=trainable,
        rescored=rescored,
        contexts=taught.contexts,
        teacher=taught.scores,
        contexts_truncated=taught.truncated,
        unusable=unusable,
        faults=faults | taught.faults,
        logp_teacher_wrong=wrong[0],
        wrong_valid=wrong[1],
        thoughts=thought_mask(judged, parts.policy) if needs.thoughts else None,
        logp_reference=None if parts.reference is None else reference_log_probs(judged.rollouts, unusable),
    )
    scored.advantages = judged.advantages.masked_fill(unusable, 0.0)
    return scored


def rescore(judged: Judged, needed: Tensor, policy: Policy, sampling: Sampling) -> None:
    """Computes `Rollout.logp_policy` of the rollouts selected by `needed`, bool [N]."""
    chosen = [r for r, need in zip(judged.rollouts, needed.tolist(), strict=True) if need]
    scores = policy.score([(r.prompt_ids, r.response_ids) for r in chosen], sampling.temperature)
    for rollout, logp in zip(chosen, scores, strict=True):
        rollout.logp_policy = logp


def score_by_reference(
    judged: Judged, needed: Tensor, policy: Policy, reference: FrozenWeights, sampling: Sampling
) -> None:
    """Computes `Rollout.logp_reference` of the rollouts selected by `needed`, bool [N]."""
    chosen = [r for r, need in zip(judged.rollouts, needed.tolist(), strict=True) if need]
    with reference.applied_to(policy):
        scores = policy.score([(r.prompt_ids, r.response_ids) for r in chosen], sampling.temperature)
    for rollout, logp in zip(chosen, scores, strict=True):
        rollout.logp_reference = logp


def assign_credit(scored: Scored, method: Method, settings: EpochSettings) -> EpochRecord:
    """Computes the method's token credit. Rollouts with non-finite log-probs of policy or sampler get no credit but
    count in the mean over the mini-batch; those with non-finite log-probs of the teacher count as not scored. With
    `model.mask_truncated`, truncated rollouts get no credit and do not count in the mean.

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
            logp_teacher_wrong=scored.logp_teacher_wrong,
            wrong_valid=scored.wrong_valid,
            thoughts=scored.thoughts,
            gate_open=scored.gate_open,
            sum_over_ranks=sum_over_ranks,
        )
    )
    credit = credit.without(scored.unusable)
    if settings.mask_truncated:
        counted = ~scored.truncated if credit.counted is None else credit.counted & ~scored.truncated
        credit = replace(credit.without(scored.truncated), counted=counted)
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
    source: Source, parts: Parts, settings: EpochSettings, phase: Phase, progress: Progress
) -> tuple[EpochRecord, Batches[MicroBatch]]:
    """Runs all stages of one epoch.

    Args:
        source: Provides the problems and their rollouts.
        parts: The epoch's components.
        settings: See `EpochSettings`.
        phase: Context manager of each phase.
        progress: Displays the progress of a phase.
    """

    def with_verdicts(questions: Questions) -> list[Rollout]:
        with phase("rollout"):
            pairs = source.draw(questions)
        with phase("verify"):
            return collect_verdicts(questions.problems, pairs, settings.max_fault_share, progress)

    questions, rollouts, drawn = draw_rounds(source, with_verdicts, settings.sampling_rounds)
    with phase("advantages"):
        judged = judge(questions, rollouts, drawn, parts.method, settings)
    with progress.phase("scoring") as advance, parts.policy.counter.reporting(partial(advance, 0)):
        scored = score(judged, parts, settings, phase)
    if parts.gate is not None:
        step_gate(scored, parts.gate)
    record = assign_credit(scored, parts.method, settings)
    return record, pack(record, settings, parts.policy.work if parts.policy.shares_prompts else None)
