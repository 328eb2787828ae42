"""Compares a teacher that sees its context with the student: their accuracies, and the tokens on which they differ."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Literal, get_args

from rlrt_lightning.epoch.make import EpochSettings, Parts, Phase, judge, score
from rlrt_lightning.epoch.record import Questions
from rlrt_lightning.epoch.teaching import shown_contexts
from rlrt_lightning.evaluation.metrics import mean_with_interval
from rlrt_lightning.objective.ratios import log_ratio
from rlrt_lightning.rollouts import Rollout
from rlrt_lightning.runtime.seeding import derive_seed

Kind = Literal["digits", "operators", "words", "formatting"]

KINDS: tuple[Kind, ...] = get_args(Kind)
"""The kinds of tokens, in the order of tables and pictures."""

OPERATORS = set("+-*/^%·∙⋅∶")
"""Characters that count as operators, besides those of Unicode's category Sm (such as = < > × ÷ − ≤)."""

REPEATED = set("-*")
"""Operators that are formatting when repeated, such as in `**bold**` and in `---`."""

LATEX_OPERATORS = set(
    r"\cdot \times \div \pm \mp \frac \dfrac \tfrac \sqrt \sum \prod \int \le \leq \ge \geq \ne \neq \approx \equiv "
    r"\sim \to \implies \iff \in \cap \cup \mid \circ \Rightarrow \rightarrow".split()
)
"""LaTeX commands that count as operators; others, such as `\\boxed`, are formatting."""


@dataclass(frozen=True)
class Taught:
    """Student and teacher on one problem.

    Args:
        index: Index of the problem among those of all ranks.
        student: Share of the student's rollouts that are correct.
        teacher: Share of the teacher's responses that are correct, one response for each rollout with a context; None
            if no rollout of the problem has a context.
        responses: Number of the teacher's responses.
        truncated: Number of the teacher's responses that are truncated.
        tokens: Number of scored tokens, by kind.
        disagreement: Sum of |D_t| over these tokens, nats, by kind.
    """

    index: int
    student: float
    teacher: float | None
    responses: int
    truncated: int
    tokens: dict[Kind, int]
    disagreement: dict[Kind, float]


def token_kind(text: str) -> Kind:
    """The kind of a token, by its text alone.

    A token with letters is a word, also with digits in it (`x2`); otherwise one with digits is a number (` (7)`);
    otherwise one with an operator is an operator. LaTeX commands are operators (`\\frac`) or formatting (`\\boxed`).
    All else is formatting: punctuation, white space and special tokens, whose text is empty.

    Args:
        text: The decoded token; "" for a special token.
    """
    stripped = text.strip()
    if stripped.startswith("\\") and stripped[1:].isalpha():
        return "operators" if stripped in LATEX_OPERATORS else "formatting"
    if any(c.isalpha() or c == "�" for c in stripped):  # � is a part of a character
        return "words"
    if any(c.isnumeric() for c in stripped):
        return "digits"
    if len(stripped) > 1 and set(stripped) <= REPEATED:
        return "formatting"
    operator = any(c in OPERATORS or unicodedata.category(c) == "Sm" for c in stripped)
    return "operators" if operator else "formatting"


def evaluate_teacher(
    questions: Questions,
    rollouts: list[Rollout],
    parts: Parts,
    settings: EpochSettings,
    phase: Phase,
    answer: Callable[[Questions], list[Rollout]],
) -> list[Taught]:
    """Compares the teacher with the student on this rank's problems, with the stages of a training epoch.

    The student's rollouts get contexts as in training, and are scored by the teacher. For each rollout with a context,
    the teacher then writes a response of its own after the prompt with which it has scored the rollout.

    Args:
        questions: P problems; their seeds also determine those of the teacher's responses.
        rollouts: The student's rollouts with verdicts, ordered by problem.
        parts: Policy, teacher, method and engine.
        settings: See `EpochSettings`.
        phase: Context manager of each phase.
        answer: Generates one response of the teacher for each of the given prompts, with verdicts and in their order.
    """
    scored = score(judge(questions, rollouts, {}, parts.method, settings), parts, settings, phase, every=True)
    shown = shown_contexts(scored, ~scored.unusable, parts, settings)
    contexts = [s if has else None for s, has in zip(shown, scored.has_context.tolist(), strict=True)]
    prompts, _ = parts.teacher.prompts(parts.policy, scored.problems, rollouts, contexts)
    asked = [i for i, ids in enumerate(prompts) if ids]
    of = [rollouts[i].group for i in asked]
    seeds = [derive_seed(questions.seeds[rollouts[i].group], "teacher", rollouts[i].index) for i in asked]
    answers = answer(
        Questions(
            questions.epoch,
            [scored.problems[group] for group in of],
            [prompts[i] for i in asked],
            seeds,
            [questions.indices[group] for group in of],
        )
    )
    gaps = log_ratio(scored.logp_student, scored.logp_teacher, scored.mask & scored.has_context[:, None]).abs()
    kind_of = cache(lambda token: token_kind(parts.policy.decode([token])))
    correct, found = scored.correct.tolist(), []
    for group, index in enumerate(questions.indices):
        rows = [i for i, rollout in enumerate(rollouts) if rollout.group == group]
        own = [response for response, g in zip(answers, of, strict=True) if g == group]
        tokens, disagreement = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0.0)
        for i in rows:
            if prompts[i]:
                # The rest of the row is padding.
                for kind, gap in zip(map(kind_of, rollouts[i].response_ids), gaps[i].tolist(), strict=False):
                    tokens[kind] += 1
                    disagreement[kind] += gap
        found.append(
            Taught(
                index=index,
                student=fmean(correct[i] for i in rows),
                teacher=fmean(_is_correct(response) for response in own) if own else None,
                responses=len(own),
                truncated=sum(response.truncated for response in own),
                tokens=tokens,
                disagreement=disagreement,
            )
        )
    return found


def _is_correct(rollout: Rollout) -> bool:
    return rollout.verdict is not None and rollout.verdict.correct


def teacher_metrics(results: Sequence[Taught]) -> dict[str, float]:
    """Metrics by tag, without the prefix `teacher/`. Both accuracies are over the problems with a context, with the
    bounds of their 95 % confidence intervals over problems; they are missing if there are none. Kinds without tokens
    have no mean.

    Args:
        results: The problems of all ranks, at least one.
    """
    taught = [result for result in sorted(results, key=lambda result: result.index) if result.teacher is not None]
    metrics = {"with_context": len(taught) / len(results)}
    if not taught:
        return metrics
    accuracies = {
        "accuracy": [result.teacher for result in taught if result.teacher is not None],
        "student_accuracy": [result.student for result in taught],
    }
    for name, values in accuracies.items():
        metrics |= zip((name, f"{name}_low", f"{name}_high"), mean_with_interval(values), strict=True)
    metrics["truncated"] = sum(r.truncated for r in taught) / sum(r.responses for r in taught)
    tokens = {kind: sum(r.tokens[kind] for r in taught) for kind in KINDS}
    gaps = {kind: math.fsum(r.disagreement[kind] for r in taught) for kind in KINDS}
    total = sum(gaps.values())
    for kind in KINDS:
        metrics[f"tokens_{kind}"] = tokens[kind] / max(sum(tokens.values()), 1)
        metrics[f"share_{kind}"] = gaps[kind] / total if total else 0.0
        if tokens[kind]:
            metrics[f"asymmetry_{kind}"] = gaps[kind] / tokens[kind]
    return metrics


_ROWS = {"tokens": ("tokens", ".1%"), "share": ("|D|", ".1%"), "asymmetry": ("mean |D| (nats)", ".3f")}
"""Rows of the table: label and format, by metric."""


def teacher_table(metrics: dict[str, float], benchmark: str, problems: int) -> list[str]:
    """The metrics as lines for the terminal.

    Args:
        metrics: See `teacher_metrics`.
        benchmark: Name of the evaluation set.
        problems: Number of problems, with and without a context.
    """
    taught = round(metrics["with_context"] * problems)
    title = f"  teacher  {taught} of {problems} problems of {benchmark} with a context"
    if not taught:
        return [f"{title}: no accuracy and no D"]
    both = []
    for name, tag in {"student": "student_accuracy", "teacher": "accuracy"}.items():
        both.append(f"{name} {metrics[tag]:.3f} [{metrics[f'{tag}_low']:.3f}, {metrics[f'{tag}_high']:.3f}]")
    rows = [["", *KINDS]]
    for name, (label, form) in _ROWS.items():
        tags = [f"{name}_{kind}" for kind in KINDS]
        rows.append([label, *(format(metrics[tag], form) if tag in metrics else "-" for tag in tags)])
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return [f"{title}: {'  '.join(both)}", *(f"           {line}" for line in lines)]
