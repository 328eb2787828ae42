"""The methods on a language model: SmolLM2-135M-Instruct learns sums (benchmarks/language_model.yaml).

    python benchmarks/language_model.py --model models/smollm2-135m-instruct --out runs/language_model --seeds 300-303

All methods run with the same seeds, which decide the problems and their order. A run that was interrupted resumes from
its last checkpoint, a finished one is skipped, and one with other settings is refused. At its end each run is evaluated
with 64 samples a problem, GRPO and RLRT with the first seed also with reflection injection and distribution shift; then
its weights are deleted. A large GPU has room for many runs at once (--jobs).

Writes to RESULTS, which is OUT unless it is given:
    epochs.csv       metrics of every epoch of every run
    evaluations.csv  evaluations during training: avg@8, pass@8, length, accuracy of the teacher and of the student on
                     the problems for which the teacher has a context
    solved.csv       how many of the 64 samples of each held-out problem are correct at the end
and prints the tables. Without --out nothing is trained: the tables are made from the three files.

Intervals are over seeds (Student's t of the differences between runs with the same seed, corrected for the number of
comparisons), and for pass@k over problems too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from paired_runs import ROOT, execute, gain, markdown, read_csv, rounded, seed_range, spread, write_csv

METHODS = {  # flags of each method
    "GRPO": ["--config=configs/methods/grpo.yaml"],
    "GRPO without std": ["--config=configs/methods/grpo.yaml", "--model.method.normalize_std=false"],
    "RLRT": ["--config=configs/methods/rlrt.yaml"],
    "RLSD": ["--config=configs/methods/rlsd.yaml"],
    "AntiSD": ["--config=configs/methods/antisd.yaml"],
    "RLRT-all": ["--config=configs/methods/rlrt_all.yaml"],
    "RLRT contrast": ["--config=configs/methods/rlrt_contrast.yaml"],
    "SDPO": ["--config=configs/methods/sdpo.yaml"],
    "SRPO": ["--config=configs/methods/srpo.yaml"],
    "RLCSD": ["--config=configs/methods/rlcsd.yaml"],
}
LAYERS = ("configs/rlrt.yaml", "configs/models/smollm2.yaml")
EXPERIMENT = "benchmarks/language_model.yaml"
ANALYSED = ("GRPO", "RLRT")
INSTRUMENTS = {  # with their flags
    "reflection": ["--samples=16", "--per_problem=4", "--continuations=8"],
    "shift": ["--samples=8"],
}
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
)
NAN = float("nan")  # a metric that a method does not have
COUNTS = ("samples", "correct")
WORDS = ("method", "problem")


class Run(NamedTuple):
    """One training run."""

    method: str
    seed: int

    def folder(self, out: Path) -> Path:
        return out / self.method.replace(" ", "-").lower() / f"seed-{self.seed}"


# -- training ------------------------------------------------------------------------------------------------------


def settings(run: Run, model: Path, extra: list[str]) -> list[str]:
    """The flags that decide a run's results."""
    layers = [f"--config={ROOT / path}" for path in (*LAYERS, EXPERIMENT)]
    method = [flag.replace("=configs/", f"={ROOT}/configs/") for flag in METHODS[run.method]]
    if not run.method.startswith("GRPO"):
        method.append(f"--teacher_evaluation.problems={TAUGHT}")
    return [*layers, *method, f"--seed_everything={run.seed}", f"--model.policy.path={model}", *extra]


def fingerprint(run: Run, model: Path, extra: list[str]) -> str:
    """Changes with the settings and the weights of a run."""
    flags = [flag.replace(str(ROOT), "").replace(str(model), "MODEL") for flag in settings(run, model, extra)]
    digest = hashlib.sha256(json.dumps([flags, SAMPLES]).encode())
    for path in (*LAYERS, EXPERIMENT, METHODS[run.method][0].removeprefix("--config=")):
        digest.update((ROOT / path).read_bytes())
    digest.update((model / "model.safetensors").read_bytes())
    return digest.hexdigest()


def train(run: Run, model: Path, out: Path, extra: list[str], threads: int, analysed: bool = False) -> None:
    """Trains and evaluates one run, or resumes it, unless it is finished."""
    folder, made = run.folder(out), fingerprint(run, model, extra)
    name = f"{run.method}, seed {run.seed}"
    if (folder / "settings").exists() and (folder / "settings").read_text() != made:
        raise SystemExit(f"{folder} was trained with other settings or weights; set --out to another folder")
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings").write_text(made)
    flags = settings(run, model, extra)
    place = [f"--trainer.logger.save_dir={folder}", "--trainer.logger.name=run"]
    last = min(folder.glob("run/*/checkpoints/last.ckpt"), default=None)
    resume = [f"--ckpt_path={last}"] if last else []
    fit = ["-m", "rlrt_lightning", "fit", *flags, *place, *resume, "--trainer.enable_progress_bar=false"]
    execute(fit, name, threads, folder / "log")
    (last,) = folder.glob("run/*/checkpoints/last.ckpt")
    place = [f"--ckpt_path={last}", "--trainer.logger=false"]
    evaluate = ["-m", "rlrt_lightning", "validate", *flags, *place, "--teacher_evaluation.problems=0"]
    evaluate += [f"--data.benchmarks.heldout.samples={SAMPLES}", f"--evaluation.results={folder / 'evaluation'}"]
    execute(evaluate, f"evaluation of {name}", threads, folder / "log")
    for instrument, own in INSTRUMENTS.items() if analysed else ():
        analyse = ["-m", "rlrt_lightning", instrument, *flags, *place, *own, f"--out={folder / instrument}"]
        execute(analyse, f"{instrument} of {name}", threads, folder / "log")
    for part in ("checkpoints", "export"):
        shutil.rmtree(last.parents[1] / part, ignore_errors=True)
    (folder / "done").touch()
    print(f"{name}: done", flush=True)


# -- results -------------------------------------------------------------------------------------------------------


def collect(runs: list[Run], out: Path, results: Path) -> None:
    """Writes the tables of the finished runs."""
    from pyarrow.parquet import read_table

    from rlrt_lightning.analysis.events import scalars

    epochs, evaluations, solved = [], [], []
    for run in runs:
        if not (run.folder(out) / "evaluation" / "heldout.parquet").exists():
            continue
        curves: dict[str, dict[int, float]] = {}
        for folder in sorted(run.folder(out).glob("run/*")):
            for tag, curve in scalars(folder).items():
                curves.setdefault(tag, {}).update(curve)
        epochs += [{**run._asdict(), **row} for row in of_epochs(curves)]
        evaluations += [{**run._asdict(), **row} for row in of_evaluations(curves)]
        problems = read_table(run.folder(out) / "evaluation" / "heldout.parquet", columns=["problem", *COUNTS])
        solved += [{**run._asdict(), **row} for row in problems.to_pylist()]
    if not solved:
        raise SystemExit(f"no run in {out} is finished")
    for name, rows in (("epochs", epochs), ("evaluations", evaluations), ("solved", solved)):
        write_csv(results / f"{name}.csv", rows)


def of_epochs(curves: dict[str, dict[int, float]]) -> Iterator[dict[str, Any]]:
    """The metrics of each epoch; those that a method does not have are NaN."""
    for epoch, step in enumerate(sorted(curves["rollout/reward"])):
        values = {tag.split("/")[1]: curves.get(tag, {}).get(step, NAN) for tag in EPOCH_TAGS}
        values["seconds"] = sum(curves[tag].get(step, 0.0) for tag in TIME_TAGS)
        yield {"epoch": epoch, **rounded(values, 4)}


def of_evaluations(curves: dict[str, dict[int, float]]) -> Iterator[dict[str, Any]]:
    """The evaluations: before training, and at the end of every 20th epoch."""
    for step in sorted(curves["eval/heldout/avg@8"]):
        values = {
            tag.removeprefix("eval/heldout/").replace("/", "_"): curves.get(tag, {}).get(step, NAN)
            for tag in EVALUATION_TAGS
        }
        yield {"step": step, **rounded(values, 4)}


# -- tables --------------------------------------------------------------------------------------------------------


def tables(results: Path) -> str:
    """Scores and differences to GRPO, and pass@k, as Markdown."""
    epochs, evaluations, solved = (
        read_csv(results / f"{name}.csv", WORDS) for name in ("epochs", "evaluations", "solved")
    )
    runs = list(dict.fromkeys((row["method"], row["seed"]) for row in solved))
    scores = {run: score(run, epochs, evaluations) for run in runs}
    methods = list(dict.fromkeys(method for method, _ in runs))
    lines = []
    for method in methods:
        own = [scores[run] for run in runs if run[0] == method]
        cells = [method, str(len(own)), *(spread([values[name] for values in own]) for name in own[0])]
        gains = (gain(differences(scores, method, name), len(methods) - 1) for name in ("avg@8 end", "reward"))
        lines.append([*cells, *gains])
    names = ["method", "seeds", *next(iter(scores.values())), "avg@8 end minus GRPO's", "reward minus GRPO's"]
    return f"{markdown(names, lines)}\n\n{curves_of_k(solved, methods)}"


def score(run: tuple[str, float], *tables: list[dict[str, Any]]) -> dict[str, float]:
    """The numbers by which runs are compared, from the tables of epochs and evaluations."""
    epochs, evaluations = ([row for row in table if (row["method"], row["seed"]) == run] for table in tables)
    last = epochs[-len(epochs) // 10 :]
    return {
        "avg@8 start": evaluations[0]["avg@8"],
        "avg@8 middle": evaluations[len(evaluations) // 2]["avg@8"],
        "avg@8 end": evaluations[-1]["avg@8"],
        "reward": fmean(row["reward"] for row in epochs),
        "length end": fmean(row["length"] for row in last),
        "entropy end": fmean(row["entropy"] for row in last),
    }


def differences(scores: dict[tuple[str, float], dict[str, float]], method: str, name: str) -> list[float]:
    """The differences to GRPO's runs with the same seeds."""
    return [
        values[name] - scores["GRPO", seed][name]
        for (other, seed), values in scores.items()
        if other == method != "GRPO" and ("GRPO", seed) in scores
    ]


def curves_of_k(solved: list[dict[str, Any]], methods: list[str]) -> str:
    """pass@k at the end: the mean over seeds, with its 95 % interval over problems."""
    from rlrt_lightning.evaluation.results import pass_curve

    counts = [{**row, **{name: int(row[name]) for name in COUNTS}} for row in solved]
    curves = {method: pass_curve([row for row in counts if row["method"] == method]) for method in methods}
    head = ["pass@k at the end", *(f"k = {point['k']}" for point in next(iter(curves.values())))]
    cell = "{pass:.3f} ({low:.3f} to {high:.3f})"
    return markdown(head, ([method, *(cell.format(**point) for point in curve)] for method, curve in curves.items()))


# -- command -------------------------------------------------------------------------------------------------------


def arguments(words: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct (docs/engines.md)")
    parser.add_argument("--out", type=Path, help="folder for the runs; without it nothing is trained")
    parser.add_argument("--results", type=Path, help="folder for the three files (default: OUT)")
    parser.add_argument("--seeds", type=seed_range, default=seed_range("300-303"), help="a range, or a count from 0")
    parser.add_argument("--methods", nargs="+", default=list(METHODS)[:5], choices=METHODS, help="methods")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads of a run")
    parser.add_argument("extra", nargs="*", help="further flags for every run, after --")
    args = parser.parse_args(words)
    if not (args.out or args.results):
        parser.error("set --out to train, or --results to the folder with the three files")
    if args.out and not args.model:
        parser.error("set --model to the model's folder")
    return args


def main() -> None:
    args = arguments()
    results = args.results or args.out
    if args.out:
        runs = [Run(method, seed) for seed in args.seeds for method in args.methods]
        places = args.model.absolute(), args.out.absolute(), args.extra, args.threads
        with ThreadPoolExecutor(args.jobs) as pool:
            started = [
                pool.submit(train, run, *places, run.method in ANALYSED and run.seed == args.seeds[0]) for run in runs
            ]
        collect(sorted(runs, key=lambda run: [*METHODS].index(run.method)), args.out, results)
        for done in started:
            done.result()  # a failure counts after the others are kept
    print(f"\n{tables(results)}")


if __name__ == "__main__":
    main()
