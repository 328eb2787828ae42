"""The methods on a language model: SmolLM2-135M-Instruct learns sums (benchmarks/language_model.yaml).

    python benchmarks/language_model.py --model models/smollm2-135m-instruct --out runs/language_model --seeds 300-303

All methods run with the same seeds, which decide the problems and their order. A run that was interrupted resumes from
its last checkpoint, a finished one is skipped, and one with other settings is refused. At its end each run is evaluated
with 64 samples a problem, GRPO and RLRT with the first seed also with reflection injection and distribution shift; then
its weights are deleted. A large GPU has room for many runs at once (--jobs).

Writes to RESULTS, which is OUT unless it is given:
    epochs.csv       metrics of every epoch of every run
    evaluations.csv  evaluations during training: avg@8, pass@8, length, accuracy of the teacher and of the student on
                     the problems for which the teacher has a context, shares of digits and words in tokens and in |D|
    solved.csv       how many of the 64 samples of each held-out problem are correct at the end
    grpo, rlrt       what the instruments measured: reflection_summary.csv, shift.parquet
and prints the tables. Without --out nothing is trained: tables and plot are made from the three files. Several
experiments with different seeds make one table. Epochs and evaluations that not all runs have are left out.

Intervals are over seeds (Student's t of the differences between runs with the same seed, corrected for the number of
comparisons), and for pass@k over problems only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from language_model_results import COUNTS, NAN, Results, plot, plot_instruments, tables
from paired_runs import METHODS as CONFIGS
from paired_runs import ROOT, execute, rounded, seed_range, write_csv

METHODS = {**CONFIGS, "GRPO repeated": "grpo"}  # how much differs between two runs of the same settings
LAYERS = ("configs/rlrt.yaml", "configs/models/smollm2.yaml")
EXPERIMENTS = {
    "two-numbers": ("language_model",),
    "two-numbers-cpu": ("language_model", "language_model_cpu"),
    "confirmation": ("language_model", "language_model_cpu", "language_model_confirmation"),
}
PLANNED = ("GRPO", "GRPO with std", "RLRT", "RLSD", "AntiSD")
"""Trained unless --methods is given."""
ANALYSED = ("GRPO", "RLRT")
INSTRUMENTS = {  # with their flags
    "reflection": ["--samples=16", "--per_problem=4", "--continuations=8"],
    "shift": ["--samples=8"],
}
KEPT = ("reflection/reflection_summary.csv", "shift/shift.parquet")
SAMPLES, TAUGHT = 64, 64
EPOCH_TAGS = (
    "rollout/reward",
    "rollout/length",
    "train/entropy",
    "rollout/truncated",
    "rollout/mismatch_mean",
    "groups/mixed",
    "signal/context_of_correct",
    "signal/effective_advantage",
    "signal/asymmetry_correct",
)
TIME_TAGS = ("time/rollout", "time/train")
EVALUATION_TAGS = (
    "eval/heldout/avg@8",
    "eval/heldout/pass@8",
    "eval/heldout/length",
    "teacher/accuracy",
    "teacher/student_accuracy",
    "teacher/with_context",
    "teacher/tokens_digits",
    "teacher/share_digits",
    "teacher/tokens_words",
    "teacher/share_words",
)


class Run(NamedTuple):
    """One training run."""

    method: str
    seed: int

    @property
    def slug(self) -> str:
        return self.method.replace(" ", "-").lower()

    def folder(self, out: Path) -> Path:
        return out / self.slug / f"seed-{self.seed}"


class Plan(NamedTuple):
    """What all runs have in common."""

    model: Path
    experiment: str
    extra: list[str]


# -- training ------------------------------------------------------------------------------------------------------


def config_files(run: Run, plan: Plan) -> list[Path]:
    experiment = [f"benchmarks/{name}.yaml" for name in EXPERIMENTS[plan.experiment]]
    return [ROOT / path for path in (*LAYERS, *experiment, f"configs/methods/{METHODS[run.method]}.yaml")]


def settings(run: Run, plan: Plan) -> list[str]:
    """The flags that decide a run's results."""
    layers = [f"--config={path}" for path in config_files(run, plan)]
    taught = [] if run.method.startswith("GRPO") else [f"--teacher_evaluation.problems={TAUGHT}"]
    return [*layers, *taught, f"--seed_everything={run.seed}", f"--model.policy.path={plan.model}", *plan.extra]


def fingerprint(run: Run, plan: Plan) -> str:
    """Changes with the settings and the weights of a run."""
    flags = [flag.replace(str(ROOT), "").replace(str(plan.model), "MODEL") for flag in settings(run, plan)]
    digest = hashlib.sha256(json.dumps([flags, SAMPLES]).encode())
    for path in config_files(run, plan):
        digest.update(path.read_bytes())
    digest.update((plan.model / "model.safetensors").read_bytes())
    return digest.hexdigest()


def train(run: Run, out: Path, plan: Plan, threads: int, instruments: Sequence[str] = ()) -> None:
    """Trains, evaluates and analyses one run, or resumes it, unless it is finished."""
    folder, made = run.folder(out), fingerprint(run, plan)
    name = f"{run.method}, seed {run.seed}"
    if (folder / "settings").exists() and (folder / "settings").read_text() != made:
        raise SystemExit(f"{folder} was trained with other settings or weights; set --out to another folder")
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings").write_text(made)
    flags = settings(run, plan)
    place = [f"--trainer.logger.save_dir={folder}", "--trainer.logger.name=run"]
    last = min(folder.glob("run/*/checkpoints/last.ckpt"), default=None)
    resume = [f"--ckpt_path={last}"] if last else []
    fit = ["-m", "rlrt_lightning", "fit", *flags, *place, *resume, "--trainer.enable_progress_bar=false"]
    execute(fit, name, threads, folder / "log")
    (last,) = folder.glob("run/*/checkpoints/last.ckpt")
    trained = [f"--ckpt_path={last}", "--trainer.logger=false"]
    evaluate = ["-m", "rlrt_lightning", "validate", *flags, *trained, "--teacher_evaluation.problems=0"]
    evaluate += [f"--data.benchmarks.heldout.samples={SAMPLES}", f"--evaluation.results={folder / 'evaluation'}"]
    execute(evaluate, f"evaluation of {name}", threads, folder / "log")
    for instrument in instruments:
        own = [*INSTRUMENTS[instrument], f"--out={folder / instrument}"]
        analyse = ["-m", "rlrt_lightning", instrument, *flags, *trained, *own]
        execute(analyse, f"{instrument} of {name}", threads, folder / "log")
    for part in ("checkpoints", "export"):
        shutil.rmtree(last.parents[1] / part, ignore_errors=True)
    (folder / "done").touch()
    print(f"{name}: done", flush=True)


# -- results -------------------------------------------------------------------------------------------------------


def collect(runs: list[Run], out: Path, results: Path) -> bool:
    """Writes the tables of all runs that have metrics, and of the final evaluations that exist.

    Returns:
        Whether there is any such evaluation. Without one nothing is written.
    """
    from pyarrow.parquet import read_table

    from rlrt_lightning.analysis.events import scalars

    epochs, evaluations, solved = [], [], []
    for run in runs:
        curves: dict[str, dict[int, float]] = {}
        for folder in sorted(run.folder(out).glob("run/*")):
            for tag, curve in scalars(folder).items():
                curves.setdefault(tag, {}).update(curve)
        if "eval/heldout/avg@8" not in curves or "rollout/reward" not in curves:
            continue
        epochs += [{**run._asdict(), **row} for row in of_epochs(curves)]
        evaluations += [{**run._asdict(), **row} for row in of_evaluations(curves)]
        if (problems := run.folder(out) / "evaluation" / "heldout.parquet").exists():
            rows = read_table(problems, columns=["problem", *COUNTS]).to_pylist()
            solved += [{**run._asdict(), **row} for row in rows]
        for path in (run.folder(out) / file for file in KEPT):
            if path.exists():
                (results / run.slug).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, results / run.slug / path.name)
    if solved:
        for name, rows in (("epochs", epochs), ("evaluations", evaluations), ("solved", solved)):
            write_csv(results / f"{name}.csv", rows)
    return bool(solved)


def of_epochs(curves: dict[str, dict[int, float]]) -> Iterator[dict[str, Any]]:
    """The metrics of each epoch; those that a method does not have are NaN."""
    for epoch, step in enumerate(sorted(curves["rollout/reward"])):
        values = {tag.split("/")[1]: curves.get(tag, {}).get(step, NAN) for tag in EPOCH_TAGS}
        values["seconds"] = sum(curves[tag].get(step, 0.0) for tag in TIME_TAGS)
        yield {"epoch": epoch, **rounded(values, 4)}


def of_evaluations(curves: dict[str, dict[int, float]]) -> Iterator[dict[str, Any]]:
    """The evaluations: before training, and at the end of every 20th epoch."""
    for step in sorted(curves["eval/heldout/avg@8"]):
        epoch = sum(start <= step for start in curves["rollout/reward"])
        values = {tag: curves.get(tag, {}).get(step, NAN) for tag in EVALUATION_TAGS}
        names = {tag: tag.removeprefix("eval/heldout/").replace("/", "_") for tag in EVALUATION_TAGS}
        yield {"epoch": epoch, **rounded({names[tag]: value for tag, value in values.items()}, 4)}


# -- command -------------------------------------------------------------------------------------------------------


def arguments(words: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct (docs/engines.md)")
    parser.add_argument("--out", type=Path, help="folder for the runs; without it nothing is trained")
    parser.add_argument("--results", type=Path, nargs="+", help="folder for the three files (default: OUT)")
    parser.add_argument("--figures", type=Path, help="folder for the plots; without it none is made")
    parser.add_argument(
        "--experiment", default="two-numbers", choices=EXPERIMENTS, help="task and settings of all runs"
    )
    parser.add_argument("--seeds", type=seed_range, default=seed_range("300-303"), help="a range, or a count from 0")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="methods to train and to show")
    parser.add_argument("--baseline", default="GRPO", choices=METHODS, help="method to which the others are compared")
    parser.add_argument(
        "--instruments",
        nargs="*",
        default=list(INSTRUMENTS),
        choices=INSTRUMENTS,
        help="analyses of GRPO and RLRT with the first seed",
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads of a run")
    parser.add_argument("extra", nargs="*", help="further flags for every run, after --")
    args = parser.parse_args(words)
    if not (args.out or args.results):
        parser.error("set --out to train, or --results to the folder with the three files")
    if args.out and not args.model:
        parser.error("set --model to the model's folder")
    args.results = args.results or [args.out]
    if len(args.results) > 1 and (args.out or args.figures):
        parser.error("set --results to one folder to train or to plot; with several it only prints tables")
    return args


def main() -> None:
    args = arguments()
    results = args.results[0]
    if args.out:
        runs = [Run(method, seed) for seed in args.seeds for method in args.methods or PLANNED]
        plan = Plan(args.model.absolute(), args.experiment, args.extra)
        with ThreadPoolExecutor(args.jobs) as pool:
            started = []
            for run in runs:
                instruments = args.instruments if run.method in ANALYSED and run.seed == args.seeds[0] else ()
                started.append(pool.submit(train, run, args.out.absolute(), plan, args.threads, instruments))
        kept = collect(sorted(runs, key=lambda run: [*METHODS].index(run.method)), args.out, results)
        for done in started:
            done.result()  # a failure counts after the others are kept
        if not kept:
            raise SystemExit(f"no run in {args.out} was evaluated at its end")
    found = Results.read(*args.results, methods=args.methods)
    print(f"\n{tables(found, args.baseline)}")
    if args.figures:
        print("\nwrote", *plot(found, args.figures), *plot_instruments(results, args.figures))


if __name__ == "__main__":
    main()
