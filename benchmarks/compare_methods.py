"""Compares the methods on the embedded task, with its trap and without.

    python benchmarks/compare_methods.py --out runs/compare --seeds 200-215

All methods run with the same seeds. A run is the README's command with the method's config and a seed, on one thread.
The control has questions without the trap, and a model that `tools/warm_start.py --no-trap` makes first (a few
minutes, kept in OUT/control-weights). Finished runs are skipped, and refused if they had other settings or weights; a
run that was interrupted starts anew.

Writes to RESULTS, which is OUT unless it is given:
    runs.csv     metrics of every run
    labels.csv   reward and share of each way in every epoch of every run
The files keep what they have of other runs. Prints the table below. Without --out nothing is trained: the table and the
plot of the shares (labels.png in FIGURES) are made from the two files.

The table has means ± standard deviations over seeds. A run is caught in the trap if it answers most of the longer
problems by `skip` at its end. "reward minus that of GRPO" is the mean difference between runs with the same seed, with
the paired interval of Student's t that, by Bonferroni's correction, contains the true difference in 95 % of the cases
for all methods of the table together; the exact tests below it are corrected alike. The interval assumes that the
differences are about normally distributed, which they are not if a few runs are caught.

Questions, sampling and the choice of siblings have separate random streams, so runs with the same seed see the same
questions in the same order, whatever the method.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from math import comb
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml
from paired_runs import (
    METHODS,
    ROOT,
    execute,
    gains,
    markdown,
    read_csv,
    read_texts,
    rounded,
    seed_range,
    spread,
    write_csv,
)

SOURCES = ("tools/warm_start.py", "rlrt_lightning/tasks/last_digit/task.py")
"""What the control's model depends on."""

CONDITIONS = ("trap", "control")
WORDS = ("condition", "method")
WAYS = ("guess", "skip", "quick", "careful", "other")
COLUMNS = {  # name in the table: tag, and how the curve is reduced to one number
    "reward": ("rollout/reward", "mean"),
    "avg@8 middle": ("eval/heldout/avg@8", "middle"),
    "avg@8 end": ("eval/heldout/avg@8", "last"),
    "longer end": ("eval/longer/avg@8", "last"),
    "careful end": ("eval/heldout/labels/careful", "last"),
    "skip, longer end": ("eval/longer/labels/skip", "last"),
}


class Run(NamedTuple):
    """One training run."""

    condition: str
    method: str
    seed: int

    def folder(self, out: Path) -> Path:
        return out / self.condition / METHODS[self.method] / f"seed-{self.seed}"


# -- training ------------------------------------------------------------------------------------------------------


def make_control_weights(out: Path) -> None:
    """Makes the control's model in OUT/control-weights, unless it is complete."""
    folder, made = out / "control-weights", digest_of_sources()
    if (folder / "done").exists():
        if (folder / "done").read_text() != made:
            raise SystemExit(
                f"{folder} was made by another version of {' or '.join(SOURCES)}; delete it to make it anew"
            )
        return
    shutil.rmtree(folder, ignore_errors=True)
    print("making the weights of the control, a few minutes", flush=True)
    execute([str(ROOT / SOURCES[0]), "--no-trap", "--out", str(folder)], "weights of the control")
    (folder / "done").write_text(made)


def digest_of_sources() -> str:
    """Changes with the code that makes the control's model, but not with its comments."""
    trees = [ast.dump(ast.parse((ROOT / path).read_text(encoding="utf-8"))) for path in SOURCES]
    return hashlib.sha256("".join(trees).encode()).hexdigest()


def settings(run: Run, out: Path, extra: list[str]) -> list[str]:
    """The flags that decide a run's results, besides its config files."""
    flags = [f"--seed_everything={run.seed}", *extra]
    if run.condition == "control":
        flags += [f"--model.policy.path={out / 'control-weights'}"]
        flags += ["--data.task.trap=false", "--data.benchmarks.longer.task.trap=false"]
    return flags


def fingerprint(run: Run, out: Path, extra: list[str]) -> str:
    """Changes with the settings and the weights of a run."""
    from rlrt_lightning.policy.model import EMBEDDED

    weights = EMBEDDED if run.condition == "trap" else out / "control-weights"
    configs = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in config_files(run)]
    digest = hashlib.sha256(json.dumps([run, extra, configs]).encode())
    digest.update((weights / "model.safetensors").read_bytes())
    return digest.hexdigest()


def config_files(run: Run) -> list[Path]:
    return [ROOT / "configs" / "rlrt.yaml", ROOT / "configs" / "methods" / f"{METHODS[run.method]}.yaml"]


def train(run: Run, out: Path, extra: list[str]) -> None:
    """Trains one run, unless it is finished."""
    folder, made = run.folder(out), fingerprint(run, out, extra)
    name = f"{run.condition}, {run.method}, seed {run.seed}"
    if (folder / "done").exists():
        if (folder / "done").read_text() != made:
            raise SystemExit(f"{folder} was trained with other settings or weights; set --out to another folder")
        return
    shutil.rmtree(folder, ignore_errors=True)
    command = ["-m", "rlrt_lightning", "fit", *(f"--config={path}" for path in config_files(run))]
    command += [f"--trainer.logger.save_dir={folder.parent}", f"--trainer.logger.name={folder.name}"]
    command += ["--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"]
    command += ["--reversed_signal.picture_every_n_epochs=0", *settings(run, out, extra)]
    execute(command, name)
    (folder / "done").write_text(made)
    print(f"{name}: done", flush=True)


def train_all(runs: list[Run], out: Path, extra: list[str], jobs: int) -> None:
    """Trains the runs in parallel; the first failure cancels those that have not started."""
    if any(run.condition == "control" for run in runs):
        make_control_weights(out)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(train, run, out, extra) for run in runs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# -- results -------------------------------------------------------------------------------------------------------


def summary(curves: dict[str, list[tuple[int, float]]]) -> dict[str, float]:
    """The values of `COLUMNS` of one run. A label that is missing from an evaluation has the share 0.

    Args:
        curves: Steps and values of every metric, by tag.
    """
    values = {}
    for name, (tag, how) in COLUMNS.items():
        steps = [step for step, _ in curves["eval/heldout/avg@8" if "/labels/" in tag else tag]]
        found = dict(curves.get(tag, []))
        curve = [found.get(step, 0.0) for step in steps]
        values[name] = {"mean": fmean(curve), "middle": curve[len(curve) // 2], "last": curve[-1]}[how]
    return values


def epochs(curves: dict[str, list[tuple[int, float]]]) -> list[dict[str, float]]:
    """Reward and share of each way in every epoch; a label that is missing from an epoch has the share 0."""
    shares = {way: dict(curves.get(f"labels/{way}", [])) for way in WAYS}
    return [
        {"epoch": epoch, "reward": reward, **{way: shares[way].get(step, 0.0) for way in WAYS}}
        for epoch, (step, reward) in enumerate(curves["rollout/reward"])
    ]


def collect(runs: list[Run], out: Path, results: Path) -> None:
    """Writes runs.csv and labels.csv from the events of the runs; keeps the rows that they have of other runs."""
    from rlrt_lightning.analysis.events import scalars

    runs_rows, labels_rows = [], []
    for run in runs:
        (events,) = run.folder(out).glob("**/events.out.tfevents.*")
        curves = scalars(events.parent)
        runs_rows.append({**run._asdict(), **rounded(summary(curves), 4)})
        labels_rows += [{**run._asdict(), **rounded(row, 3)} for row in epochs(curves)]
    for name, rows in (("runs", runs_rows), ("labels", labels_rows)):
        path = results / f"{name}.csv"
        kept = [row for row in read_texts(path) if run_of(row) not in runs] if path.exists() else []
        write_csv(path, sorted([*rows, *kept], key=lambda row: order(run_of(row))))


def run_of(row: dict[str, Any]) -> Run:
    """The run of a row of runs.csv or labels.csv."""
    return Run(row["condition"], row["method"], int(row["seed"]))


def order(run: Run) -> tuple[int, ...]:
    """The order of the runs in the files and tables."""
    return CONDITIONS.index(run.condition), [*METHODS].index(run.method), run.seed


# -- table ---------------------------------------------------------------------------------------------------------


def tables(rows: list[dict[str, Any]], baseline: str = "GRPO") -> str:
    """The results as Markdown, one table per condition: the trap first, the control below."""
    parts = []
    for condition in CONDITIONS:
        chosen = [row for row in rows if row["condition"] == condition]
        if chosen:
            seeds = sorted({int(row["seed"]) for row in chosen})
            name = {"trap": "With the trap", "control": "Control without the trap"}[condition]
            parts.append(f"{name}, {len(seeds)} seeds ({seeds[0]} to {seeds[-1]}):\n\n{table(chosen, baseline)}")
            parts += filter(None, [caught_in_pairs(chosen, baseline)])
    return "\n\n".join(parts)


def table(rows: list[dict[str, Any]], baseline: str) -> str:
    """One row of Markdown per method."""
    lines = []
    for method, gained in gains({(row["method"], row["seed"]): row["reward"] for row in rows}, baseline).items():
        own = [row for row in rows if row["method"] == method]
        cells = [spread([row[name] for row in own]) for name in COLUMNS]
        lines.append([method, *cells, f"{sum(map(is_caught, own))} of {len(own)}", gained])
    return markdown(["method", *COLUMNS, "caught", f"reward minus that of {baseline} (95 % interval)"], lines)


def is_caught(row: dict[str, Any]) -> bool:
    """Whether a run ends in the trap."""
    return float(row["skip, longer end"]) > 0.5


def caught_in_pairs(rows: list[dict[str, Any]], baseline: str) -> str:
    """How often each method and the baseline are caught with the same seed, as Markdown; empty if none of them is."""
    caught = {(row["method"], row["seed"]): is_caught(row) for row in rows}
    lines = []
    methods = [name for name in dict.fromkeys(name for name, _ in caught) if name != baseline]
    for method in methods:
        seeds = [seed for name, seed in caught if name == method and (baseline, seed) in caught]
        both = sum(caught[baseline, seed] and caught[method, seed] for seed in seeds)
        only = [sum(caught[name, seed] for seed in seeds) - both for name in (baseline, method)]
        p = min(1.0, len(methods) * exact_test(*only))
        lines.append([method, *map(str, (len(seeds), both, *only)), f"{p:.2f}"])
    if not any(caught.values()) or not lines:
        return ""
    what = "exact McNemar test" + (f", corrected for {len(methods)} comparisons" if len(methods) > 1 else "")
    head = ["caught with the same seed", "pairs", "both", f"only {baseline}", "only the method", "p"]
    return f"{markdown(head, lines)}\n\np: {what}."


def exact_test(only_first: int, only_second: int) -> float:
    """p of McNemar's exact test, from the numbers of pairs in which only one of the two is caught."""
    n = only_first + only_second
    return min(1.0, 2 * sum(comb(n, i) for i in range(min(only_first, only_second) + 1)) / 2**n)


# -- command -------------------------------------------------------------------------------------------------------


def arguments(words: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the runs; without it nothing is trained")
    parser.add_argument("--results", type=Path, help="folder for runs.csv and labels.csv (default: OUT)")
    parser.add_argument("--figures", type=Path, help="folder for labels.png; without it none is made")
    parser.add_argument("--seeds", type=seed_range, default=range(8), help="a range such as 200-215, or a count from 0")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="methods (default: all)")
    parser.add_argument("--baseline", default="GRPO", choices=METHODS, help="method to which the others are compared")
    parser.add_argument("--plotted", nargs="+", choices=METHODS, help="methods in labels.png (default: up to four)")
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel runs")
    parser.add_argument("--control", action=argparse.BooleanOptionalAction, default=True, help="also run the control")
    parser.add_argument("extra", nargs="*", help="further flags for every run, after --")
    args = parser.parse_args(words)
    if not (args.out or args.results):
        parser.error("set --out to train, or --results to the folder with runs.csv and labels.csv")
    return args


def main() -> None:
    from label_plot import plot

    args = arguments()
    results = args.results or args.out
    if args.out:
        conditions = CONDITIONS if args.control else CONDITIONS[:1]
        runs = [Run(c, m, s) for s in args.seeds for c in conditions for m in args.methods]
        out = args.out.absolute()
        train_all(runs, out, args.extra, args.jobs)
        collect(runs, out, results)
    rows = [row for row in read_csv(results / "runs.csv", WORDS) if row["method"] in args.methods]
    print(f"\n{tables(rows, args.baseline)}")
    if args.figures:
        plot(read_csv(results / "labels.csv", WORDS), args.figures / "labels.png", args.plotted)
        print("\nwrote", args.figures / "labels.png")


if __name__ == "__main__":
    main()
