"""Reflection injection (arXiv:2605.10781, Fig. 6): does it matter *where* the policy is made to reconsider?

A wrong rollout of a hard problem, or a correct rollout of an easy problem, is cut at the position where student and
teacher differ most, where they differ least, and at a random one. A text is inserted there and the policy continues.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from rlrt_lightning.analysis.plots import panels, save, style
from rlrt_lightning.datamodule import RolloutDataModule
from rlrt_lightning.evaluation.metrics import mean_with_interval
from rlrt_lightning.module import RLRTModule
from rlrt_lightning.objective import divergence
from rlrt_lightning.objective.methods import Context
from rlrt_lightning.rollouts import Rollout
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.seeding import derive_seed, generator
from rlrt_lightning.tasks import Problem, Verdict

WHERE = ("largest", "smallest", "random")
BOUNDS = ("low", "high")
HARD, EASY = (0.0, 0.25), (0.625, 0.875)  # fraction of correct rollouts; of 8 rollouts: 0 to 2, and 5 to 7


def position_kl(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor]:
    """KL(P_S || P_T) at each position in nats, [C], from logits [C, V]."""
    return (divergence(student_logits, teacher_logits, alpha=1.0),)


def choose_positions(kl: Tensor, pick: torch.Generator) -> dict[str, int]:
    """The positions of the largest, the smallest and a random KL.

    Args:
        kl: KL at each position in nats, [T].
        pick: Random generator.
    """
    return {
        "largest": int(kl.argmax()),
        "smallest": int(kl.argmin()),
        "random": int(torch.randint(len(kl), (), generator=pick)),
    }


def difficulty(correct: int, samples: int) -> str | None:
    """Whether a problem with this many correct rollouts is "hard" or "easy"; None for neither."""
    share = correct / samples
    if HARD[0] <= share <= HARD[1]:
        return "hard"
    return "easy" if EASY[0] <= share <= EASY[1] else None


def flip_rates(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fraction of continuations that flipped the verdict, for each difficulty, text and position.

    Args:
        rows: Dicts with `kind` (the difficulty), `text`, `where`, `problem` and `flipped`.

    Returns:
        Dicts with `kind`, `text`, `where`, `problems`, the mean over problems `flipped`, and the bounds `low` and
        `high` of its 95 % confidence interval over problems.
    """
    by_problem: dict[tuple[str, str, str], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_problem[row["kind"], row["text"], row["where"]][row["problem"]].append(row["flipped"])
    rates = []
    for (kind, text, where), problems in by_problem.items():
        shares = [fmean(flips) for flips in problems.values()]
        found = mean_with_interval(shares)
        group = {"kind": kind, "text": text, "where": where, "problems": len(shares)}
        rates.append({**group, "flipped": found.mean, "low": found.low, "high": found.high})
    return rates


@dataclass
class Reflection:
    """Cuts rollouts, inserts a text, and measures how often the continuation flips the verdict.

    Args:
        samples: Number of rollouts per problem.
        text: Inserted text.
        context: Context of the teacher.
        per_problem: Maximum number of rollouts to cut per problem.
        continuations: Number of continuations from each position.
    """

    samples: int
    text: str
    context: Context
    per_problem: int
    continuations: int

    def __call__(
        self, module: RLRTModule, data: RolloutDataModule, benchmark: str, limit: int | None, out: Path
    ) -> list[Path]:
        """Runs the experiment; returns the written files.

        Raises:
            ConfigError: If the tokenizer cannot encode the text, or no rollout can be cut.
        """
        inserted = self._tokens(module)
        spec = data.benchmarks[benchmark]
        problems = list(data.benchmark_problems(benchmark)[:limit])
        sampling = spec.sampling or data.sampling
        seeds = [derive_seed(data.seed, "reflection", i) for i in range(len(problems))]
        rollouts = data.draw(spec.task or data.task, problems, self.samples, sampling, seeds)

        chosen, shown, skipped = self._choose(module, data, problems, rollouts)
        student = [(r.prompt_ids, r.response_ids) for r, _ in chosen]
        teacher = [(ids, r.response_ids) for ids, (r, _) in zip(shown, chosen, strict=True)]
        with data.computing():
            kls = module.policy.compare(position_kl, student, teacher, module.teacher, sampling.temperature)

        rows: list[dict[str, Any]] = []
        prefixes: list[tuple[Rollout, list[int]]] = []
        for (rollout, kind), (kl,) in zip(chosen, kls, strict=True):
            pick = generator(data.seed, "positions", rollout.group, rollout.index)
            for where, position in choose_positions(kl, pick).items():
                for text, ids in inserted.items():
                    row = {"problem": problems[rollout.group].id, "sample": rollout.index, "kind": kind, "where": where}
                    rows.append({**row, "text": text, "position": position, "kl": float(kl[position])})
                    prefixes.append((rollout, rollout.response_ids[:position] + ids))
        finished = self._continue(module, data, benchmark, problems, prefixes)
        done = [
            {**row, "continuation": n, "flipped": verdict.correct != (row["kind"] == "easy")}
            for row, verdicts in zip(rows, finished, strict=True)
            for n, verdict in enumerate(verdicts)
        ]
        print(f"cut {len(chosen)} rollouts; skipped {skipped} without a context for the teacher")
        return self._write(done, out)

    def _tokens(self, module: RLRTModule) -> dict[str, list[int]]:
        """The tokens of each inserted text, including the empty control."""
        tokenizer = module.policy.tokenizer
        ids = list(tokenizer(self.text, add_special_tokens=False)["input_ids"]) if self.text else []
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            raise ConfigError(
                f"text is {self.text!r}, which the tokenizer cannot encode completely; use another text, or "
                "--text= to insert nothing"
            )
        return {self.text: ids, "": []}

    def _choose(
        self, module: RLRTModule, data: RolloutDataModule, problems: list[Problem], rollouts: list[Rollout]
    ) -> tuple[list[tuple[Rollout, str]], list[list[int]], int]:
        """Chooses the rollouts to cut.

        Returns:
            The rollouts with the difficulty of their problems, the teacher's prompt tokens for each, and the number of
            rollouts skipped because they have no context.
        """
        correct = torch.tensor([r.verdict is not None and r.verdict.correct for r in rollouts])
        policy, teacher = module.policy, module.teacher
        contexts = teacher.contexts(self.context, problems, rollouts, correct, data.seed, policy=policy)
        correct_per_problem: dict[int, int] = defaultdict(int)
        for rollout, right in zip(rollouts, correct.tolist(), strict=True):
            correct_per_problem[rollout.group] += right
        chosen: list[tuple[Rollout, str]] = []
        shown: list[list[int]] = []
        taken: dict[int, int] = defaultdict(int)
        skipped = 0
        for rollout, right, context in zip(rollouts, correct.tolist(), contexts, strict=True):
            kind = difficulty(correct_per_problem[rollout.group], self.samples)
            if kind is None or right != (kind == "easy") or taken[rollout.group] == self.per_problem:
                continue
            ids: list[int] = []
            if context is not None:
                room = teacher.room(policy, rollout)
                ids, _ = teacher.prompt(policy, problems[rollout.group], context, self.context, room)
            if not ids:
                skipped += 1
                continue
            taken[rollout.group] += 1
            chosen.append((rollout, kind))
            shown.append(ids)
        if not chosen:
            raise ConfigError(
                f"no rollout can be cut: none of {len(problems)} problems is hard or easy and has a {self.context} for "
                "the teacher; use more problems, more samples, or another context"
            )
        return chosen, shown, skipped

    def _continue(
        self,
        module: RLRTModule,
        data: RolloutDataModule,
        benchmark: str,
        problems: list[Problem],
        prefixes: list[tuple[Rollout, list[int]]],
    ) -> list[list[Verdict]]:
        """Continues each prefix and judges the full responses.

        Returns:
            The verdicts of the continuations of each prefix.
        """
        spec = data.benchmarks[benchmark]
        verifier = data.verifier(spec.task or data.task)
        prompts = [rollout.prompt_ids + prefix for rollout, prefix in prefixes]
        seeds = [derive_seed(data.seed, "continuations", i) for i in range(len(prompts))]
        verdicts: list[list[Future[Verdict]]] = [[] for _ in prompts]
        with data.computing():
            for drawn in data.engine.generate(prompts, self.continuations, spec.sampling or data.sampling, seeds):
                rollout, prefix = prefixes[drawn.group]
                text = module.policy.decode(prefix + drawn.response_ids)
                verdicts[drawn.group].append(verifier.submit(problems[rollout.group], text))
        return [[future.result() for future in futures] for futures in verdicts]

    def _write(self, rows: list[dict[str, Any]], out: Path) -> list[Path]:
        rates = flip_rates(rows)
        paths = [out / "reflection.csv", out / "reflection_summary.csv"]
        for path, table in zip(paths, (rows, rates), strict=True):
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(table[0]))
                writer.writeheader()
                writer.writerows(table)
        return [*paths, *plot(rates, out)]


def plot(rates: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Plots flip rates, also those of a kept reflection_summary.csv; returns the written files.

    Args:
        rates: Dicts as of `flip_rates`.
        out: The folder for reflection.png and reflection.svg.
    """
    figure, axes = panels(["hard problems: wrong to correct", "easy problems: correct to wrong"])
    texts = list(dict.fromkeys(row["text"] for row in rates))
    for axis, kind in zip(axes, ("hard", "easy"), strict=True):
        width = 0.8 / len(texts)
        for i, text in enumerate(texts):
            found = {rate["where"]: rate for rate in rates if (rate["kind"], rate["text"]) == (kind, text)}
            shown = [where for where in WHERE if where in found]
            axis.bar(
                [WHERE.index(where) + (i - (len(texts) - 1) / 2) * width for where in shown],
                [100 * found[where]["flipped"] for where in shown],
                width * 0.92,
                yerr=[[100 * abs(found[w][bound] - found[w]["flipped"]) for w in shown] for bound in BOUNDS],
                color=style(i).color,
                hatch=style(i).hatch,
                edgecolor="white",
                error_kw={"elinewidth": 0.8, "capsize": 2},
                label=f"“{text}”" if text else "nothing (control)",
            )
        counts = [rate["problems"] for rate in rates if rate["kind"] == kind]
        axis.set_xticks(range(len(WHERE)), WHERE)
        axis.set_xlabel(f"KL(student ‖ teacher) at the cut   ({max(counts, default=0)} problems)")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("flipped (%)")
    handles = max((axis.get_legend_handles_labels() for axis in axes), key=lambda found: len(found[0]))
    figure.legend(*handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return save(figure, out, "reflection")
