"""Comparison of several runs or evaluations: training curves and pass@k.

`python -m rlrt_lightning curves GRPO=runs/last-digit/grpo-0 RLRT='runs/last-digit/rlrt-*'`
`python -m rlrt_lightning pass_at_k GRPO=runs/last-digit/grpo-0 RLRT=runs/last-digit/rlrt-0`
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rlrt_lightning.analysis.events import scalars
from rlrt_lightning.analysis.plots import legend, panels, prepare_folder, save, style
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.files import EVALUATION, PLOTS, RUNS

TAGS = {
    "rollout/reward": "reward",
    "rollout/length": "response length (tokens)",
    "rollout/entropy": "policy entropy (nats)",
}
"""The metrics in the paper's Figs. 5, 9 and 11, with their axis labels."""

COMMANDS = ("curves", "pass_at_k")


def main(argv: Sequence[str]) -> None:
    """Runs one of `COMMANDS`.

    Args:
        argv: The command and its arguments.
    """
    parser = argparse.ArgumentParser(prog="rlrt_lightning", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    descriptions = {
        "curves": "Training curves of several runs (Figs. 5, 9, 11): curves.csv, curves.png, curves.svg.",
        "pass_at_k": "pass@k of several evaluations (Fig. 8): pass_at_k.csv, pass_at_k.png, pass_at_k.svg.",
    }
    for name, text in descriptions.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument(
            "folders",
            nargs="+",
            metavar="NAME=FOLDER",
            help="a name, and the folder of its runs or results, or a pattern; several runs of one name count as seeds",
        )
        command.add_argument("--out", type=Path, help=f"output folder (default: a new one in {RUNS / PLOTS})")
    commands.choices["curves"].add_argument(
        "--tags", nargs="+", default=list(TAGS), metavar="TAG", help=f"metrics to plot (default: {' '.join(TAGS)})"
    )
    args = parser.parse_args(argv)
    folders = _named(args.folders)
    out = prepare_folder(args.out or RUNS / PLOTS, args.command, new=args.out is None)
    paths = curves(folders, out, args.tags) if args.command == "curves" else pass_at_k(folders, out)
    print("wrote", *paths)


def curves(folders: dict[str, Path], out: Path, tags: Sequence[str] = tuple(TAGS)) -> list[Path]:
    """Plots the mean over the runs in each folder, with a band of one standard deviation.

    Args:
        folders: Folders with TensorBoard events, by name.
        out: Output folder, created if needed.
        tags: Metrics to plot, one panel each.

    Returns:
        The written files.

    Raises:
        ConfigError: If a folder has no events, or no run has one of the tags.
    """
    values = {name: [_curves(run, tags) for run in _runs(name, folder)] for name, folder in folders.items()}
    for tag in tags:
        if not any(run[tag] for runs in values.values() for run in runs):
            raise ConfigError(f"curves: no run has the tag {tag}")
    out.mkdir(parents=True, exist_ok=True)
    with (out / "curves.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "run", "step", "tag", "value"])
        for name, runs in values.items():
            for number, run in enumerate(runs):
                writer.writerows([name, number, step, tag, v] for tag in tags for step, v in run[tag].items())

    figure, axes = panels([TAGS.get(tag, tag) for tag in tags])
    for axis, tag in zip(axes, tags, strict=True):
        for i, (name, runs) in enumerate(values.items()):
            by_step: dict[int, list[float]] = defaultdict(list)
            for run in runs:
                for step, value in run[tag].items():
                    by_step[step].append(value)
            steps = sorted(by_step)
            mean = [fmean(by_step[step]) for step in steps]
            spread = [stdev(by_step[step]) if len(by_step[step]) > 1 else 0.0 for step in steps]
            look = style(i)
            axis.plot(steps, mean, color=look.color, linestyle=look.linestyle, linewidth=1.3, label=name)
            if any(spread) and len(folders) <= 4:  # more bands would hide each other
                low, high = zip(*((m - s, m + s) for m, s in zip(mean, spread, strict=True)), strict=True)
                axis.fill_between(steps, low, high, color=look.color, alpha=0.12, linewidth=0)
        axis.set_xlabel("optimizer step")
    legend(figure, axes[0])
    return [out / "curves.csv", *save(figure, out, "curves")]


def pass_at_k(folders: dict[str, Path], out: Path) -> list[Path]:
    """Plots pass@k over k with 95 % confidence bands over problems, one panel per evaluation set.

    Args:
        folders: Folders with evaluation results (`<benchmark>.parquet`), by name. If a folder has the results of
            several seeds, pass@k is their mean.
        out: Output folder, created if needed.

    Returns:
        The written files.

    Raises:
        ConfigError: If a folder has no results.
    """
    from rlrt_lightning.evaluation.results import pass_curve

    tables = {name: _problems(name, folder) for name, folder in folders.items()}
    benchmarks = list(dict.fromkeys(benchmark for table in tables.values() for benchmark in table))
    points = [
        {"name": name, "benchmark": benchmark, **point}
        for name, table in tables.items()
        for benchmark, problems in table.items()
        for point in pass_curve(problems)
    ]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "pass_at_k.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["name", "benchmark", "k", "pass", "low", "high"])
        writer.writeheader()
        writer.writerows(points)

    figure, axes = panels(benchmarks)
    for axis, benchmark in zip(axes, benchmarks, strict=True):
        for i, name in enumerate(folders):
            curve = [p for p in points if p["name"] == name and p["benchmark"] == benchmark]
            look, ks, mean = style(i), [p["k"] for p in curve], [p["pass"] for p in curve]
            axis.plot(
                ks, mean, color=look.color, linestyle=look.linestyle, marker=look.marker, ms=3, lw=1.2, label=name
            )
            low, high = ([p[bound] for p in curve] for bound in ("low", "high"))
            axis.fill_between(ks, low, high, color=look.color, alpha=0.12, linewidth=0)
        axis.set_xscale("log", base=2)
        ks = sorted({p["k"] for p in points if p["benchmark"] == benchmark})
        axis.set_xticks(ks[::2], [str(k) for k in ks[::2]])
        axis.set_xlabel("k")
        axis.set_ylabel("pass@k")
        axis.set_ylim(top=min(1.02, axis.get_ylim()[1]))
    legend(figure, axes[0])
    return [out / "pass_at_k.csv", *save(figure, out, "pass_at_k")]


def _named(arguments: Sequence[str]) -> dict[str, Path]:
    """Parses NAME=FOLDER arguments."""
    folders: dict[str, Path] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"{argument} has to be NAME=FOLDER, such as RLRT=runs/last-digit/rlrt-0")
        if name in folders:
            raise ConfigError(f"the name {name} is given twice; choose another name for {folder}")
        if not _matching(Path(folder)):
            raise ConfigError(f"{name}: there is no folder {folder}")
        folders[name] = Path(folder)
    return folders


def _matching(folder: Path) -> list[Path]:
    """The folder, or those that match it as a pattern."""
    return [folder] if folder.is_dir() else sorted(path for path in map(Path, glob(str(folder))) if path.is_dir())


def _runs(name: str, folder: Path) -> list[Path]:
    """The folders with TensorBoard events in a folder, without those of evaluations."""
    matching = _matching(folder)
    found = sorted({path.parent for each in matching for path in each.glob("**/events.out.tfevents.*")})
    found = [path for path in found if EVALUATION not in (path.name, path.parent.name)]
    if not found:
        raise ConfigError(f"{name}: there is no run with TensorBoard events in {folder}")
    return found


def _curves(run: Path, tags: Sequence[str]) -> dict[str, dict[int, float]]:
    curves = scalars(run)
    return {tag: dict(curves.get(tag, ())) for tag in tags}


def _problems(name: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows (`problem`, `samples`, `correct`) of all results in a folder, by evaluation set."""
    import pyarrow.parquet

    tables: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(path for each in _matching(folder) for path in each.glob("**/*.parquet")):
        with path.open("rb") as file:
            rows = pyarrow.parquet.read_table(file).to_pylist()
        if rows and {"benchmark", "problem", "samples", "correct"} <= rows[0].keys():  # skip other instruments' files
            tables[rows[0]["benchmark"]] += rows
    if not tables:
        raise ConfigError(f"{name}: there are no evaluation results (<benchmark>.parquet) in {folder}")
    return tables
