"""Training runs of several methods with the same seeds, and the statistics of their differences."""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryFile
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

METHODS = {
    "GRPO": "grpo",
    "GRPO with std": "grpo_std",
    "RLRT": "rlrt",
    "RLRT-all": "rlrt_all",
    "RLRT contrast": "rlrt_contrast",
    "RLSD": "rlsd",
    "teacher-predicted": "teacher_predicted",
    "SDPO": "sdpo",
    "SRPO": "srpo",
    "AntiSD": "antisd",
    "AntiSD no gate": "antisd_no_gate",
    "RLCSD": "rlcsd",
    "GRPO + entropy": "grpo_entropy",
    "DIVER": "diver",
}
"""The config of each method, in configs/methods."""


def seed_range(text: str) -> list[int]:
    """`200-215` is these seeds, both ends included; `8` is the seeds 0 to 7."""
    first, dash, last = text.partition("-")
    try:
        seeds = list(range(int(first), int(last) + 1)) if dash else list(range(int(first)))
    except ValueError:
        seeds = []
    if not seeds:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a range such as 200-215 nor a count such as 8")
    return seeds


def execute(arguments: list[str], name: str, threads: int = 1, log: Path | None = None) -> None:
    """Runs Python, which can import the package and these scripts; exits with the end of its messages if it fails.

    Args:
        arguments: Arguments of the interpreter.
        name: What runs, for the message.
        threads: Number of CPU threads.
        log: File to which its output is appended.
    """
    paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}
    with log.open("a+", encoding="utf-8") if log else TemporaryFile("w+", encoding="utf-8") as output:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=env, stdout=output, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            output.seek(0)
            raise SystemExit(f"{name}: {output.read()[-2000:]}")


# -- tables --------------------------------------------------------------------------------------------------------


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows with the same keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path, words: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a file of `write_csv`, with numbers as numbers.

    Args:
        path: The file.
        words: The columns of text.
    """
    if not path.exists():
        raise SystemExit(f"{path} does not exist; set --out to train")
    rows = read_texts(path)
    return [{name: text if name in words else float(text) for name, text in row.items()} for row in rows]


def read_texts(path: Path) -> list[dict[str, str]]:
    """The rows of a file of `write_csv`, as they stand there."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rounded(values: dict[str, float], digits: int) -> dict[str, str]:
    """Numbers as short texts: 0.25 instead of 0.2500."""
    return {name: f"{round(value, digits):g}" for name, value in values.items()}


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(
        [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    )


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    return f"{fmean(values):.3f} ± {stdev(values) if len(values) > 1 else 0:.3f}"


# -- statistics ----------------------------------------------------------------------------------------------------


def paired(differences: Sequence[float], comparisons: int = 1) -> tuple[float, float, float]:
    """The mean of at least two paired differences, and its 95 % interval by Student's t.

    Args:
        differences: One for each seed.
        comparisons: Number of comparisons of which all intervals contain their means in 95 % of the cases
            (Bonferroni's correction).
    """
    mean, freedom = fmean(differences), len(differences) - 1
    width = students_t(1 - 0.025 / comparisons, freedom) * stdev(differences) / len(differences) ** 0.5
    return mean, mean - width, mean + width


def gain(differences: Sequence[float], comparisons: int) -> str:
    """`paired` as text; a dash for fewer than two differences, of which the spread is unknown."""
    if len(differences) < 2:
        return "-"
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*paired(differences, comparisons))


def gains(scores: Mapping[tuple[str, float], float], baseline: str) -> dict[str, str]:
    """The difference of each method to another one over runs with the same seed, as text: `gain`, corrected for the
    number of methods.

    Args:
        scores: One for each method and seed.
        baseline: The method to which the others are compared; its own text is a dash.
    """
    methods = list(dict.fromkeys(method for method, _ in scores))
    if baseline not in methods:
        raise SystemExit(f"--baseline has to be a method with runs, one of {', '.join(methods)}")
    differences: dict[str, list[float]] = {method: [] for method in methods}
    for (method, seed), score in scores.items():
        if method != baseline and (baseline, seed) in scores:
            differences[method].append(score - scores[baseline, seed])
    return {method: gain(found, len(methods) - 1) for method, found in differences.items()}


@cache
def students_t(probability: float, freedom: int) -> float:
    """The quantile of Student's t, for probabilities above 1/2 (by the incomplete beta function)."""
    import mpmath  # which sympy requires

    half = mpmath.mpf(freedom) / 2

    def above(t: Any) -> Any:
        return mpmath.betainc(half, 0.5, 0, freedom / (freedom + t * t), regularized=True) / 2 - (1 - probability)

    return float(mpmath.findroot(above, (0, 1000), solver="bisect", maxsteps=100))
