"""Compares the methods on the embedded task: `python benchmarks/compare_methods.py --out runs/compare`.

All methods run with the same seeds. A run is the README's command with the method's config and a seed, on one thread.
Finished runs are skipped. Prints a table of mean and standard deviation over seeds and of the difference from GRPO with
the same seed, and writes the metrics of every run to `OUT/runs.csv`.

Questions, sampling and the choice of siblings have separate random streams, so runs with the same seed see the same
questions in the same order, whatever the method.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    "GRPO": "grpo",
    "RLRT": "rlrt",
    "RLRT-all": "rlrt_all",
    "RLSD": "rlsd",
    "teacher-predicted": "teacher_predicted",
    "SDPO": "sdpo",
    "SRPO": "srpo",
    "GRPO + entropy": "grpo_entropy",
    "DIVER": "diver",
}
COLUMNS = {  # name in the table: tag, and how the curve is reduced to one number
    "reward": ("rollout/reward", "mean"),
    "avg@8 middle": ("eval/heldout/avg@8", "middle"),
    "avg@8 end": ("eval/heldout/avg@8", "last"),
    "longer end": ("eval/longer/avg@8", "last"),
    "complete end": ("eval/heldout/labels/complete", "last"),
}


def train(out: Path, method: str, seed: int, extra: list[str]) -> None:
    folder = out / METHODS[method] / f"seed-{seed}"
    if (folder / "done").exists():
        return
    command = [sys.executable, "-m", "rlrt_lightning", "fit", "--config", str(ROOT / "configs" / "rlrt.yaml")]
    command += ["--config", str(ROOT / "configs" / "methods" / f"{METHODS[method]}.yaml"), f"--seed_everything={seed}"]
    command += [f"--trainer.logger.save_dir={out / METHODS[method]}", f"--trainer.logger.name=seed-{seed}"]
    command += ["--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false"]
    command += ["--reversed_signal.picture_every_n_epochs=0", *extra]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method}, seed {seed}: {done.stderr[-2000:]}")
    (folder / "done").touch()
    print(f"{method}, seed {seed}: done", flush=True)


def figures(folder: Path) -> dict[str, float]:
    from rlrt_lightning.analysis.events import scalars

    (events,) = folder.glob("**/events.out.tfevents.*")
    curves = scalars(events.parent)
    values = {}
    for name, (tag, how) in COLUMNS.items():
        curve = [value for _, value in curves.get(tag, [(0, 0.0)])]
        values[name] = {"mean": statistics.fmean(curve), "middle": curve[len(curve) // 2], "last": curve[-1]}[how]
    return values


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs and runs.csv")
    parser.add_argument("--seeds", type=int, default=8, help="number of seeds per method, from 0")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="methods (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel runs")
    parser.add_argument("extra", nargs="*", help="further flags for every run, after --")
    args = parser.parse_args()
    work = [(method, seed) for seed in range(args.seeds) for method in args.methods]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda w: train(args.out, *w, args.extra), work))

    runs = {(m, s): figures(args.out / METHODS[m] / f"seed-{s}") for m, s in work}
    with (args.out / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", *COLUMNS])
        writer.writerows([m, s, *(f"{v:.4f}" for v in values.values())] for (m, s), values in runs.items())

    print(f"\n| method | {' | '.join(COLUMNS)} | reward - GRPO's (seeds above 0) | stuck (complete < 1/2) |")
    print("| --- |" + " --- |" * (len(COLUMNS) + 2))
    for method in args.methods:
        rows = [runs[method, s] for s in range(args.seeds)]
        cells = [spread([row[c] for row in rows]) for c in COLUMNS]
        paired = "-"
        if method != "GRPO" and "GRPO" in args.methods:
            gains = [row["reward"] - runs["GRPO", s]["reward"] for s, row in enumerate(rows)]
            paired = f"{statistics.fmean(gains):+.3f} ({sum(g > 0 for g in gains)}/{len(gains)})"
        stuck = sum(row["complete end"] < 0.5 for row in rows)
        print(f"| {method} | {' | '.join(cells)} | {paired} | {stuck}/{args.seeds} |")


if __name__ == "__main__":
    main()
