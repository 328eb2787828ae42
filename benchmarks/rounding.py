"""How much of the updates arrives in the weights that the model computes with, and what that does to learning.

    python benchmarks/rounding.py --model models/smollm2-135m-instruct --out runs/rounding --seeds 304-305

GRPO on the task of benchmarks/language_model.yaml in bf16-mixed with and without dither (`model.policy.dither`) and in
float32, with the same seeds. A finished run is skipped; one with another model or length is replaced. The model's files
contain bfloat16 weights. Prints:
    changed   share of the rounded weights (matrices of the decoder layers) that differ from the initial ones; in
              float32, of the weights themselves
    arrived   <rounded change, change> / <change, change> of the float32 weights: 1 if rounding loses nothing on average
    reward    mean reward of the epochs since the row before
    entropy   mean entropy of the policy in these epochs, nats
each as the mean over the seeds, and held-out avg@8 before and after training.
"""

from __future__ import annotations

import argparse
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import language_model as lm
import torch
from lightning import Callback
from paired_runs import execute, markdown, read_csv, rounded, seed_range, spread, write_csv

SETTINGS = {
    "bf16-mixed, without dither": ["--trainer.precision=bf16-mixed", "--model.policy.dither=false"],
    "bf16-mixed, with dither": ["--trainer.precision=bf16-mixed"],
    "float32": ["--trainer.precision=32-true"],
}


class Arrived(Callback):
    """Writes after each epoch what has arrived in the rounded weights.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Keeps the initial weights."""
        named = pl_module.policy.model.named_parameters()
        self.start = {name: p.detach().clone() for name, p in named if ".layers." in name and p.ndim > 1}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Compares with the initial weights."""
        half = torch.float32 if trainer.precision == "32-true" else torch.bfloat16
        count, changed, product, square = 0, 0.0, 0.0, 0.0
        for name, start in self.start.items():
            now = pl_module.policy.model.get_parameter(name).detach()
            change, seen = now - start, now.to(half).float() - start.to(half).float()
            count += change.numel()
            changed += float((seen != 0).sum())
            product += float((change * seen).sum())
            square += float((change * change).sum())
        row = {"epoch": trainer.current_epoch + 1.0, "changed": changed / count, "arrived": product / square}
        self.rows.append(rounded(row, 5))
        write_csv(self.path, self.rows)


def flags(setting: str, seed: int, folder: Path, model: Path, epochs: int) -> list[str]:
    """The flags of a run."""
    return [
        *lm.settings(lm.Run("GRPO", seed), lm.Plan(model, "two-numbers-cpu", SETTINGS[setting])),
        f"--trainer.max_epochs={epochs}",
        f"--trainer.check_val_every_n_epoch={epochs}",
        f"--trainer.logger.save_dir={folder}",
        "--trainer.logger.name=run",
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks+=rounding.Arrived",
        f"--trainer.callbacks.path={folder / 'arrived.csv'}",
    ]


def train(setting: str, seed: int, folder: Path, model: Path, epochs: int, threads: int) -> None:
    """Trains one run, unless it is finished."""
    done, made = folder / "done", f"{epochs} epochs of {model}"
    if done.exists() and done.read_text() == made:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = ["-m", "rlrt_lightning", "fit", *flags(setting, seed, folder, model, epochs)]
    execute(command, f"{setting}, seed {seed}", threads, folder / "log")
    done.write_text(made)


def table(runs: list[tuple[str, int, Path]], epochs: int) -> str:
    """The table of all runs."""
    from rlrt_lightning.analysis.events import scalars

    lines = []
    ends = [epoch for epoch in (1, 4, 8, 12, 16, 20, 40, 60, 80, 100) if epoch < epochs] + [epochs]
    for setting in SETTINGS:
        folders = [folder for name, _, folder in runs if name == setting]
        arrived = [read_csv(folder / "arrived.csv", []) for folder in folders]
        curves = [scalars(next(folder.glob("run/*"))) for folder in folders]
        scores = [[score for _, score in curve["eval/heldout/avg@8"]] for curve in curves]
        for first, last in zip([0, *ends], ends, strict=False):

            def mean(tag: str, first: int = first, last: int = last, curves: Any = curves) -> str:
                return f"{fmean(value for curve in curves for _, value in curve[tag][first:last]):.2f}"

            seen = [f"{fmean(rows[last - 1][name] for rows in arrived):.3f}" for name in ("changed", "arrived")]
            score = spread([found[-1] for found in scores]) if last == epochs else ""
            lines.append([setting, f"{last}", *seen, mean("rollout/reward"), mean("rollout/entropy"), score])
        lines.insert(len(lines) - len(ends), [setting, "0", "0", "", "", "", spread([found[0] for found in scores])])
    return markdown(["precision", "epoch", "changed", "arrived", "reward", "entropy", "avg@8"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M-Instruct (docs/engines.md)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=seed_range, default=seed_range("304-305"), help="a range, or a count from 0")
    parser.add_argument("--epochs", type=int, default=12, help="number of epochs")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads of a run")
    args = parser.parse_args()
    out, model = args.out.absolute(), args.model.absolute()
    runs = [(name, seed, out / f"{i}" / f"seed-{seed}") for i, name in enumerate(SETTINGS) for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        started = [pool.submit(train, *run, model, args.epochs, args.threads) for run in runs]
    for run in started:
        run.result()
    print(table(runs, args.epochs))


if __name__ == "__main__":
    main()
