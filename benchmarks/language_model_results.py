"""The tables and the plot of `language_model.py`, from its three files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from paired_runs import gains, markdown, read_csv, spread

WORDS = ("method", "problem")
COUNTS = ("samples", "correct")
TEACHER = {
    "teacher_with_context": "problems with a context",
    "teacher_student_accuracy": "student there",
    "teacher_accuracy": "teacher there",
    "teacher_tokens_digits": "digits among the tokens",
    "teacher_share_digits": "digits in abs D",
    "teacher_tokens_words": "words among the tokens",
    "teacher_share_words": "words in abs D",
}
"""Columns of the table of teachers."""
SIGNAL = {
    "reward": "reward",
    "mixed": "mixed groups",
    "context_of_correct": "correct rollouts with a context",
    "effective_advantage": "effective advantage",
    "asymmetry_correct": "D of correct rollouts",
    "length": "length",
    "entropy": "entropy",
}
"""Columns of the table of the signal."""
COMPARED = ("avg@8 end", "reward")
"""Scores whose differences to the baseline are shown."""
STYLED = ("GRPO", "GRPO with std", "RLRT", "RLSD", "GRPO repeated", "AntiSD", "AntiSD no gate")
"""Methods in the order of their styles, so that each has the same one in every plot; others come after them."""
SMOOTHED = 5
"""Epochs of the running means in the plot."""
NAN = float("nan")

Rows = list[dict[str, Any]]


class Results(NamedTuple):
    """The rows of the three files, without the epochs and evaluations that not all runs have: runs are compared at the
    same age. pass@k uses only the seeds evaluated at the end for every method that has any such run."""

    epochs: Rows
    evaluations: Rows
    solved: Rows

    @classmethod
    def read(cls, *folders: Path, methods: Sequence[str] | None = None) -> Results:
        """Of these methods; None for all."""
        epochs, evaluations, solved = (
            [
                row
                for folder in folders
                for row in read_csv(folder / f"{name}.csv", WORDS)
                if not methods or row["method"] in methods
            ]
            for name in ("epochs", "evaluations", "solved")
        )
        solved = [{**row, **{name: int(row[name]) for name in COUNTS}} for row in solved]
        seeds = [{row["seed"] for row in solved if row["method"] == method} for method in {r["method"] for r in solved}]
        shared = set.intersection(*seeds) if seeds else set()
        return cls(common(epochs), common(evaluations), [row for row in solved if row["seed"] in shared])

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(row["method"] for row in self.epochs))


def by_run(rows: Rows) -> dict[tuple[str, float], Rows]:
    runs: dict[tuple[str, float], Rows] = defaultdict(list)
    for row in rows:
        runs[row["method"], row["seed"]].append(row)
    return runs


def common(rows: Rows) -> Rows:
    """The rows of each run up to the end of the shortest."""
    runs = by_run(rows)
    shortest = min(map(len, runs.values()), default=0)
    return [row for run in runs.values() for row in run[:shortest]]


def mean(values: Iterable[float]) -> float:
    """Of the values that are numbers: a method may lack a metric, and an epoch without correct rollouts has none."""
    known = [value for value in values if not isnan(value)]
    return fmean(known) if known else NAN


# -- tables --------------------------------------------------------------------------------------------------------


def tables(results: Results, baseline: str = "GRPO") -> str:
    """Scores and differences to a baseline, the signal, the teachers, and pass@k, as Markdown."""
    scores, curves = scores_table(results, baseline), curves_of_k(results, baseline)
    return "\n\n".join(filter(None, [scores, signal_table(results), teachers_table(results), curves]))


def scores_table(results: Results, baseline: str) -> str:
    evaluations, epochs = by_run(results.evaluations), by_run(results.epochs)
    scores = {run: score(epochs[run], evaluations[run]) for run in epochs}
    compared = {
        f"{name} minus that of {baseline}": gains({run: values[name] for run, values in scores.items()}, baseline)
        for name in COMPARED
    }
    lines = []
    for method in results.methods:
        own = [values for (name, _), values in scores.items() if name == method]
        cells = [method, str(len(own)), *(spread([values[name] for values in own]) for name in own[0])]
        lines.append([*cells, *(gained[method] for gained in compared.values())])
    return markdown(["method", "seeds", *next(iter(scores.values())), *compared], lines)


def score(epochs: Rows, evaluations: Rows) -> dict[str, float]:
    """The numbers by which runs are compared."""
    last = epochs[-len(epochs) // 10 :]
    return {
        "avg@8 start": evaluations[0]["avg@8"],
        "avg@8 middle": evaluations[len(evaluations) // 2]["avg@8"],
        "avg@8 end": evaluations[-1]["avg@8"],
        "pass@8 end": evaluations[-1]["pass@8"],
        "reward": mean(row["reward"] for row in epochs),
        "length end": mean(row["length"] for row in last),
        "entropy end": mean(row["entropy"] for row in last),
    }


def signal_table(results: Results) -> str:
    """The metrics of training in its first, second and last third: means over epochs and seeds."""
    count = len({row["epoch"] for row in results.epochs})
    cuts = [round(count * third / 3) for third in range(4)]
    lines = []
    for method in results.methods:
        rows = [row for row in results.epochs if row["method"] == method]
        for first, end in pairwise(cuts):
            third = [row for row in rows if first <= row["epoch"] < end]
            values = {name: mean(row[name] for row in third) for name in SIGNAL}
            cells = ["-" if isnan(value) else f"{value:.2f}" for value in values.values()]
            lines.append([method, f"{first + 1} to {end}", *cells])
    return markdown(["method", "epochs", *SIGNAL.values()], lines)


def teachers_table(results: Results) -> str:
    """What the teachers know and where D_t is: means over seeds, at each evaluation that all runs have. Empty if no
    teacher was evaluated."""
    lines = []
    for method in results.methods:
        rows = [row for row in results.evaluations if row["method"] == method]
        if isnan(mean(row["teacher_accuracy"] for row in rows)):
            continue
        columns = [over_seeds(rows, "epoch", name) for name in TEACHER]
        lines += [[method, f"{epoch:g}", *(f"{column[epoch]:.2f}" for column in columns)] for epoch in columns[0]]
    return markdown(["method", "epoch", *TEACHER.values()], lines) if lines else ""


def curves_of_k(results: Results, baseline: str) -> str:
    """pass@k at the end: the mean over seeds, with its 95 % interval over problems; and the difference to the baseline
    at the largest k, with its interval over seeds. Empty if no run of the baseline was evaluated at its end."""
    curves = {method: of_k(results, method) for method in results.methods}
    curves = {method: curve for method, curve in curves.items() if curve}
    if baseline not in curves:
        return ""
    ks = [point["k"] for point in curves[baseline]]
    runs = by_run(results.solved)
    compared = gains({run: fmean(row["correct"] > 0 for row in rows) for run, rows in runs.items()}, baseline)
    head = ["pass@k at the end", "seeds", *(f"k = {k}" for k in ks), f"k = {ks[-1]} minus that of {baseline}"]
    cell, lines = "{pass:.3f} ({low:.3f} to {high:.3f})", []
    for method, curve in curves.items():
        seeds = ", ".join(f"{seed:g}" for name, seed in sorted(runs) if name == method)
        lines.append([method, seeds, *(cell.format(**point) for point in curve), compared[method]])
    return markdown(head, lines)


def of_k(results: Results, method: str) -> Sequence[dict[str, Any]]:
    """The points of a method's pass@k curve; empty if no run of it was evaluated at its end."""
    from rlrt_lightning.evaluation.results import pass_curve

    rows = [row for row in results.solved if row["method"] == method]
    return pass_curve(rows) if rows else []


# -- plot ----------------------------------------------------------------------------------------------------------


def plot(results: Results, folder: Path) -> list[Path]:
    """Plots reward, held-out avg@8, response length, entropy and D_t over the epochs, and pass@k at the end. Lines are
    means over seeds, of the metrics of training running ones over five epochs; dots are the seeds.

    Returns:
        The written files.
    """
    from rlrt_lightning.analysis.plots import legend, panels, save, style

    shown = {"reward": "training reward", "length": "response length (tokens)", "entropy": "entropy (nats)"}
    titles = [shown["reward"], "held-out avg@8", shown["length"], shown["entropy"]]
    figure, axes = panels([*titles, "D of correct rollouts (nats)", "pass@k at the end"])
    curves = dict(zip((*shown, "asymmetry_correct"), (axes[0], axes[2], axes[3], axes[4]), strict=True))
    order = [*STYLED, *(method for method in results.methods if method not in STYLED)]
    for i, method in enumerate(results.methods):
        look = style(order.index(method))
        line: dict[str, Any] = {"color": look.color, "linestyle": look.linestyle, "linewidth": 1.3, "label": method}
        rows = [row for row in results.epochs if row["method"] == method]
        for name, axis in curves.items():
            values = over_seeds(rows, "epoch", name)
            epochs = list(values)
            smooth = [mean(values[e] for e in epochs[max(0, n - SMOOTHED + 1) : n + 1]) for n in range(len(epochs))]
            axis.plot([epoch + 1 for epoch in epochs], smooth, **line)
        runs = [run for (name, _), run in by_run(results.evaluations).items() if name == method]
        offset = (i - (len(results.methods) - 1) / 2) * 0.8  # keeps the markers of different methods from overlapping
        for run in runs:
            evaluated = [point["epoch"] + offset for point in run]
            axes[1].plot(evaluated, [point["avg@8"] for point in run], look.marker, ms=2.5, color=look.color)
        scores = over_seeds([point for run in runs for point in run], "epoch", "avg@8")
        axes[1].plot(list(scores), list(scores.values()), **line)
        if curve := of_k(results, method):
            axes[5].plot([point["k"] for point in curve], [point["pass"] for point in curve], **line)
    for axis in axes[:5]:
        axis.set_xlabel("epoch")
    axes[4].axhline(0, color="0.5", linewidth=0.6)
    axes[5].set_xscale("log", base=2)
    axes[5].set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    axes[5].set_xlabel("k")
    legend(figure, axes[0])
    return save(figure, folder, "language_model")


def plot_instruments(results: Path, folder: Path) -> list[Path]:
    """Plots what reflection injection and distribution shift measured, in a folder for each method.

    Returns:
        The written files.
    """
    import pyarrow.parquet as pq
    import torch

    from rlrt_lightning.analysis import reflection, shift

    written = []
    for kept in sorted(results.glob("*/reflection_summary.csv")):
        rates = read_csv(kept, ("kind", "text", "where"))
        rates = [{**rate, "problems": int(rate["problems"])} for rate in rates]
        written += reflection.plot(rates, folder / kept.parent.name)
    for kept in sorted(results.glob("*/shift.parquet")):
        columns = pq.read_table(kept, columns=["js", "base_probability", "overlap"]).to_pydict()
        js, probability, overlap = map(torch.tensor, columns.values())
        written += shift.plot(shift.summarize(js, probability, overlap), js, overlap, folder / kept.parent.name)
    return written


def over_seeds(rows: Rows, key: str, name: str) -> dict[float, float]:
    """The mean of a metric over the rows with the same key."""
    grouped: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        grouped[row[key]].append(row[name])
    return {at: mean(values) for at, values in sorted(grouped.items())}
