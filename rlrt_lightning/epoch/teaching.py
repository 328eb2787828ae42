"""What the teacher contributes to an epoch: contexts, scores, and the step of the method's gate."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlrt_lightning.contexts import FEEDBACK, VERDICTS, Shown
from rlrt_lightning.epoch.checks import scoring_engine
from rlrt_lightning.epoch.numerics import first_non_finite
from rlrt_lightning.epoch.record import Judged, Scored
from rlrt_lightning.objective import Context
from rlrt_lightning.objective.gate import EntropyGate
from rlrt_lightning.policy.padding import pad_rows
from rlrt_lightning.policy.texts import opens_thinking
from rlrt_lightning.runtime.ranks import gather
from rlrt_lightning.teacher import TeacherScore

if TYPE_CHECKING:
    from rlrt_lightning.epoch.make import EpochSettings, Parts
    from rlrt_lightning.policy.model import Policy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Taught:
    """The teacher's contexts and scores of N rollouts.

    Args:
        contexts: The text of each rollout's context; None if it was not scored.
        scores: The scores with it; None if it was not scored.
        wrong: The scores with each of its failed siblings (`Needs.wrong_siblings`) whose context fits.
        truncated: Number of contexts that were truncated or did not fit.
        faults: Indices and descriptions of rollouts with non-finite scores, which are left out.
    """

    contexts: list[str | None]
    scores: list[TeacherScore | None]
    wrong: list[list[TeacherScore]]
    truncated: int
    faults: dict[int, str]


def teacher_scores(judged: Judged, wanted: Tensor, usable: Tensor, parts: Parts, settings: EpochSettings) -> Taught:
    """Has the teacher score the wanted rollouts, each with all its contexts. All contexts are scored in one call, which
    reads each demonstration once for all rollouts that share it.

    Args:
        judged: N rollouts.
        wanted: True for rollouts to score, bool [N].
        usable: True for rollouts that may serve as demonstrations, bool [N].
        parts: The epoch's components.
        settings: See `EpochSettings`.
    """
    method, count = parts.method, len(judged.rollouts)
    shown = shown_contexts(judged, usable, parts, settings)
    wrong = _wrong_contexts(judged, usable, parts, settings)
    rows: list[int] = []
    asked: list[Shown] = []
    for i in wanted.nonzero()[:, 0].tolist():
        first = shown[i]
        if first is not None and (wrong[i] or not method.needs.wrong_siblings):
            rows += [i] * (1 + len(wrong[i]))
            asked += [first, *(first._replace(context=text) for text in wrong[i])]
    found, truncated = parts.teacher.score(
        parts.policy,
        judged.problems,
        [judged.rollouts[i] for i in rows],
        asked,
        settings.sampling.temperature,
        top_k=method.needs.top_k,
        engine=scoring_engine(parts.teacher, method, parts.engine, settings.sampling),
    )
    taught = Taught([None] * count, [None] * count, [[] for _ in range(count)], truncated, {})
    previous = -1
    for i, context, score in zip(rows, asked, found, strict=True):
        first_of_row, previous = i != previous, i
        if score is None:
            continue
        if fault := first_non_finite(vars(score)):
            taught.faults.setdefault(i, f"the teacher's {fault}")
        elif first_of_row:
            taught.contexts[i], taught.scores[i] = str(context), score
        else:
            taught.wrong[i].append(score)
    return taught


def shown_contexts(judged: Judged, usable: Tensor, parts: Parts, settings: EpochSettings) -> list[Shown | None]:
    """What the teacher sees of each rollout besides the prompt; None for rollouts without a context.

    Args:
        judged: N rollouts.
        usable: True for rollouts that may serve as demonstrations, bool [N].
        parts: The epoch's components.
        settings: See `EpochSettings`.
    """
    method, teacher, questions = parts.method, parts.teacher, judged.questions
    successful = method.successful(judged.rewards) & usable
    seed = settings.seed, questions.epoch, 0

    def of(kind: Context) -> list[str | None]:
        where = judged.problems, judged.rollouts, successful
        return teacher.contexts(kind, *where, *seed, indices=questions.indices, policy=parts.policy)

    kinds: dict[Context, tuple[Context, ...]] = {"none": (), "sibling_or_solution": ("sibling", "solution")}
    shown: list[Shown | None] = [None] * len(judged.rollouts)
    for kind in kinds.get(method.context, (method.context,)):
        shown = [s or (None if c is None else Shown(c, kind)) for s, c in zip(shown, of(kind), strict=True)]
    if method.needs.remark == "verdict":
        right = method.successful(judged.rewards).tolist()
        shown = [s and s._replace(remark=VERDICTS[r]) for s, r in zip(shown, right, strict=True)]
    if method.needs.remark == "feedback":
        for i, message in enumerate(of("feedback")):
            if message is not None:
                found = shown[i]
                text = teacher.limited(parts.policy, message)
                shown[i] = found._replace(remark=FEEDBACK + text) if found else Shown(message, "feedback")
    return shown


def _wrong_contexts(judged: Judged, usable: Tensor, parts: Parts, settings: EpochSettings) -> list[list[str]]:
    """The failed siblings that the teacher sees of each rollout, one at a time. A rollout on which the verifier failed
    is not known to be wrong, so it is never shown."""
    count = parts.method.needs.wrong_siblings
    if not count:
        return [[] for _ in judged.rollouts]
    judgeable = torch.tensor([r.verdict is not None and not r.verdict.fault for r in judged.rollouts])
    failed = ~parts.method.successful(judged.rewards) & usable & judgeable & judged.nonempty
    seed = settings.seed, judged.questions.epoch, 0, "wrong sibling"
    where = judged.problems, judged.rollouts, failed, count
    return parts.teacher.siblings(*where, *seed, indices=judged.questions.indices, policy=parts.policy)


def wrong_log_probs(wrong: list[list[TeacherScore]], width: int) -> tuple[Tensor, Tensor]:
    """`Signals.logp_teacher_wrong`, nats, float32 [N, C, T], and `Signals.wrong_valid`, bool [N, C].

    Args:
        wrong: The scores of N rollouts with up to C failed siblings each.
        width: T.
    """
    most = max(1, max(map(len, wrong), default=1))
    valid = torch.tensor([[k < len(scores) for k in range(most)] for scores in wrong])
    rows = [scores[k].logp if k < len(scores) else None for scores in wrong for k in range(most)]
    return pad_rows(rows, width).view(len(wrong), most, width), valid


def thought_mask(judged: Judged, policy: Policy) -> Tensor:
    """`Signals.thoughts`: True at tokens inside thinking tags, bool [N, T]."""
    opened = [opens_thinking(policy.prompt_text(problem.prompt)) for problem in judged.problems]
    rows = [torch.tensor(policy.thoughts(r.response_ids, opened[r.group])) for r in judged.rollouts]
    mask = pad_rows(rows, judged.mask.shape[1]).bool()
    if not mask.any():
        log.warning("no rollout of this epoch has text between <think> and </think>, on which the method acts")
    return mask


def step_gate(scored: Scored, gate: EntropyGate) -> None:
    """Steps a method's gate with the median of the teacher's entropy over the scored tokens of all ranks, and stores
    the result in the record. An epoch without scored tokens is no step. All ranks must call it."""
    own = [found.entropy for found in scored.teacher if found is not None and found.entropy is not None]
    entropies = torch.cat(gather(torch.cat([torch.zeros(0), *own]))).double().sort().values
    if not len(entropies):
        return
    last = len(entropies) - 1
    entropy = float((entropies[last // 2] + entropies[(last + 1) // 2]) / 2)
    scored.gate_open = gate.step(entropy)
    scored.gate_metrics = {"signal/gate_open": float(scored.gate_open), "signal/gate_entropy": entropy}
    if gate.warm_entropy is not None:
        scored.gate_metrics["signal/gate_warm_entropy"] = gate.warm_entropy
