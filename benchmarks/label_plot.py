"""Plots the share of each way over the epochs, for `compare_methods.py`."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple


class Way(NamedTuple):
    """How a way is shown: a colour from Okabe and Ito (2008), and what it does."""

    color: str
    meaning: str


WAYS = {
    "guess": Way("#999999", "guess: answers at once, right 1 time in 10"),
    "skip": Way("#E69F00", "skip the last: adds all but the last number, then guesses"),
    "quick": Way("#56B4E9", "quickly: adds all numbers, with slips"),
    "careful": Way("#009E73", "carefully: adds all numbers, nearly always right"),
}
CONDITIONS = {
    "trap": "with the trap:\nskipping is right\nhalf of the time",
    "control": "control:\nno trap",
}
PLOTTED = ("GRPO", "RLRT", "RLRT-all", "teacher-predicted")
MOST = 5
"""More columns would be too narrow to read."""

Rows = list[dict[str, Any]]


def plot(rows: Rows, path: Path, methods: list[str] | None = None) -> None:
    """Plots a panel for each condition and method: mean over seeds, and thin lines for the seeds.

    Args:
        rows: The rows of labels.csv.
        path: The image to write, 1700 pixels wide.
        methods: The methods to show, at most `MOST`; None for those of `PLOTTED` that have runs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {row["method"] for row in rows}
    chosen = methods or [m for m in PLOTTED if m in found] or sorted(found)[:MOST]
    if len(chosen) > MOST or not found.issuperset(chosen):
        raise SystemExit(f"--plotted has to be at most {MOST} methods with runs, of {', '.join(sorted(found))}")
    conditions = [c for c in CONDITIONS if any(row["condition"] == c for row in rows)]
    figure = Figure(figsize=(8.5, 0.8 + 2.1 * len(conditions)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(conditions), len(chosen), sharex=True, sharey=True, squeeze=False)
    for i, condition in enumerate(conditions):
        for j, method in enumerate(chosen):
            panel(axes[i, j], [row for row in rows if (row["condition"], row["method"]) == (condition, method)])
            axes[i, j].set_title(method if i == 0 else "", fontsize=10)
        axes[i, 0].set_ylabel(f"{CONDITIONS[condition]}\n\nshare of rollouts", fontsize=8.5)
    seeds = len({row["seed"] for row in rows})
    figure.supxlabel(f"epoch     (thick: mean over {seeds} seeds, thin: each seed)", fontsize=9)
    legend(figure, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)


def panel(axis: Any, rows: Rows) -> None:
    """Plots the shares of one method under one condition."""
    runs: dict[float, Rows] = defaultdict(list)
    for row in rows:
        runs[row["seed"]].append(row)
    for way, look in WAYS.items():
        curves = [[row[way] for row in run] for run in runs.values()]
        if not any(map(any, curves)):
            continue
        for curve in curves:
            axis.plot(curve, color=look.color, linewidth=0.5, alpha=0.3)
        axis.plot([fmean(values) for values in zip(*curves, strict=True)], color=look.color, linewidth=2)
    axis.set_ylim(0, 1)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", linewidth=0.4, alpha=0.4)


def legend(figure: Any, rows: Rows) -> None:
    """Explains the ways that occur, above the panels."""
    from matplotlib.lines import Line2D

    shown = [look for way, look in WAYS.items() if any(row[way] for row in rows)]
    handles = [Line2D([], [], color=look.color, linewidth=3) for look in shown]
    names = [look.meaning for look in shown]
    figure.legend(handles, names, loc="outside upper center", ncols=2, fontsize=8.5, frameon=False)
