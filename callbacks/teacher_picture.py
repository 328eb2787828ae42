"""Draws an evaluation of the teacher: the accuracies of teacher and student, and D_t by kind of token."""

from __future__ import annotations

from typing import Any

from rlrt_lightning.analysis.plots import legend, panels, style
from rlrt_lightning.evaluation.teacher import KINDS


def draw_teacher(metrics: dict[str, float], title: str) -> Any:
    """The figure.

    Args:
        metrics: See `rlrt_lightning.evaluation.teacher.teacher_metrics`, of at least one problem with a context.
        title: Title of the figure.

    Returns:
        A matplotlib figure with a canvas.
    """
    figure, (accuracy, share, mean) = panels(["accuracy", "share of tokens and of |D| (%)", "mean |D| (nats)"], 3.4)
    figure.suptitle(title, fontsize=10)
    bars = {"student": "student_accuracy", "teacher with context": "accuracy"}
    for i, tag in enumerate(bars.values()):
        value = metrics[tag]
        error = [[value - metrics[f"{tag}_low"]], [metrics[f"{tag}_high"] - value]]
        accuracy.bar(i, value, 0.6, yerr=error, capsize=4, **_look(i))
    accuracy.set_xticks(range(len(bars)), [f"{name}\n{metrics[tag]:.3f}" for name, tag in bars.items()])
    accuracy.set_xlim(-0.6, 1.6)
    accuracy.set_ylim(0, 1.05)
    for i, (name, prefix) in enumerate({"tokens": "tokens", "|D|": "share"}.items()):
        at = [x + (i - 0.5) * 0.4 for x in range(len(KINDS))]
        share.bar(at, [100 * metrics[f"{prefix}_{kind}"] for kind in KINDS], 0.37, label=name, **_look(i + 2))
    mean.bar(range(len(KINDS)), [metrics.get(f"asymmetry_{kind}", 0.0) for kind in KINDS], 0.6, **_look(3))
    for axis in (share, mean):
        axis.set_xticks(range(len(KINDS)), KINDS)
        axis.set_ylim(bottom=0)
    legend(figure, share)
    return figure


def _look(number: int) -> dict[str, Any]:
    return {"color": style(number).color, "hatch": style(number).hatch, "edgecolor": "white"}
