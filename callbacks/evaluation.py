"""Logs avg@k, pass@k and sample completions on held-out problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from torchmetrics import MeanMetric

from rlrt_lightning.evaluation.metrics import AvgAtK, PassAtK
from rlrt_lightning.evaluation.results import Results, Row, description, fingerprint, rows_of, summary, write_tables
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.ranks import gather
from rlrt_lightning.runtime.run_files import evaluation_folder, keep_folder

from .boards import log_scores, log_table
from .parts import callbacks_of, data_of

if TYPE_CHECKING:
    from rlrt_lightning.evaluation.sets import Evaluated
    from rlrt_lightning.module import RLRTModule

SAMPLE = ("prompt", "completion", "expected", "verdict")
"""Columns of a table of samples."""


class Evaluation(Callback):
    """Computes metrics from the verdicts in `validate`, `test`, `predict` and the validation within `fit`, and shows
    sample completions.

    Logs `eval/<benchmark>/avg@n` and `pass@k` with the bounds of their 95 % confidence intervals over problems
    (`_low`, `_high`), `length`, `truncated` and the share of each label, and gives a table of samples to the loggers
    (TensorBoard, W&B, MLflow). Outside of `fit`, every completion and its verdict is written to `<benchmark>.jsonl`
    after each batch of `data.eval_prompts` problems. At the end, one row per problem is written to
    `<benchmark>.parquet` and the pass@k curves to `pass_at_k.csv`.

    Args:
        ks: Values of k for pass@k; null logs only k = the benchmark's number of samples.
        table: Samples in each benchmark's table, half of them wrong if there are enough; 0 disables the table.
        results: Folder for these files. An evaluation that finds its own results there, from the same weights and
            settings, resumes after them. Null is a new folder, `evaluation/step-<step>[-n]`, in the folder of the run
            that is evaluated.
    """

    def __init__(self, ks: list[int] | None = None, table: int = 8, results: str | None = None) -> None:
        if ks is not None and (not ks or min(ks) < 1):
            raise ConfigError(f"evaluation.ks is {ks}; it has to be a list of numbers of at least 1, or null")
        if table < 0:
            raise ConfigError(f"evaluation.table is {table}; it has to be 0 or more")
        self.ks = ks
        self.table = table
        self.results = results
        self.scores: dict[str, dict[str, float]] = {}
        """The metrics of the latest evaluation, by evaluation set and by tag without the prefix `eval/<benchmark>/`."""
        self.folder: Path | None = None
        """Folder of the latest result files."""
        self._step: int | None = None  # optimizer steps of a checkpoint's weights
        self._counts: dict[str, _Counts] = {}
        self._results: dict[str, Results] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that there are enough samples for each k."""
        self._step = None
        for name, spec in data_of(trainer).benchmarks.items():
            too_large = [k for k in self.ks or [] if k > spec.samples]
            if too_large:
                raise ConfigError(
                    f"evaluation.ks names {too_large[0]}, but data.benchmarks.{name}.samples is {spec.samples}"
                )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Records the step of the checkpoint's weights; Lightning restores `trainer.global_step` in `fit` only."""
        self._step = checkpoint["global_step"]

    # -- collecting ------------------------------------------------------------------------------------------------

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = data_of(trainer)
        self._counts = {
            name: _Counts(self.ks or [spec.samples], spec.samples, pl_module.device)
            for name, spec in data.benchmarks.items()
        }
        self._results = {}
        for finished in data.evaluated.values():
            finished.clear()
        if trainer.state.fn != "fit":
            self._resume(trainer, cast("RLRTModule", pl_module))

    def _resume(self, trainer: Trainer, module: RLRTModule) -> None:
        """Opens the result files and counts the results in them."""
        data, folder = data_of(trainer), self._new_folder(trainer)
        self.folder = folder
        weights = fingerprint(module.policy.model)
        self._results = {name: Results(folder, name, trainer.global_rank) for name in data.benchmarks}
        wrong = None
        if trainer.is_global_zero:
            try:
                for name, results in self._results.items():
                    results.begin(description(data, name, weights), resume=self.results is not None)
            except ConfigError as error:
                wrong = error
            except OSError as error:
                wrong = ConfigError(f"evaluation.results: cannot write to {folder}: {error}")
        if (wrong := trainer.strategy.broadcast(wrong)) is not None:
            raise wrong
        for name, results in self._results.items():
            finished = results.read()
            mine = data.benchmark_problems(name)[trainer.global_rank :: trainer.world_size]
            self._counts[name].add([finished[p.id] for p in mine if p.id in finished], self.table)
            data.evaluated[name].update(finished)
        trainer.strategy.barrier()  # no rank appends to a file that another still reads

    def _collect(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        done: Evaluated = outputs
        rows = rows_of(done)
        self._counts[done.benchmark].add(rows, self.table)
        if self._results:
            keep_folder(trainer)
            self._results[done.benchmark].add(rows)

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = self.steps(trainer)
        self.scores = {name: counts.values(trainer) for name, counts in self._counts.items()}
        for name, counts in self._counts.items():
            values = {f"eval/{name}/{tag}": value for tag, value in self.scores[name].items()}
            log_scores(trainer, pl_module, values, step)
            if self.table:
                log_table(trainer, f"samples/{name}", SAMPLE, counts.table(self.table), step)
        if self._results:
            tables = {
                name: sorted(chain(*gather(counts.problems)), key=lambda row: row["problem"])
                for name, counts in self._counts.items()
            }
            if trainer.is_global_zero and self.folder is not None:
                write_tables(self.folder, tables)

    def _new_folder(self, trainer: Trainer) -> Path:
        if self.results:
            return Path(self.results)
        return evaluation_folder(trainer, self.steps(trainer))

    def steps(self, trainer: Trainer) -> int:
        """Optimizer steps of the evaluated weights."""
        loaded = trainer.state.fn != "fit" and trainer.ckpt_path is not None
        return self._step if loaded and self._step is not None else trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the engine release its memory."""
        data_of(trainer).engine.release()

    on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = _start
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _collect  # type: ignore[assignment]
    on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = _report


class _Counts:
    """One benchmark's metrics and samples on this rank."""

    def __init__(self, ks: list[int], samples: int, device: torch.device) -> None:
        self.samples = samples
        self.avg = AvgAtK(interval=True).to(device)
        self.passed = {k: PassAtK(k, interval=True).to(device) for k in ks}
        self.length, self.truncated = MeanMetric().to(device), MeanMetric().to(device)
        self.labels: Counter[str] = Counter()
        self.problems: list[Row] = []
        self.shown: dict[bool, list[Row]] = {True: [], False: []}

    def add(self, rows: Sequence[Sequence[Row]], table: int) -> None:
        if not rows:
            return
        device = self.avg.device
        correct = torch.tensor([[row["correct"] for row in of_problem] for of_problem in rows], device=device)
        for metric in (self.avg, *self.passed.values()):
            metric.update(correct)
        for of_problem in rows:
            self.length.update(torch.tensor([float(row["tokens"]) for row in of_problem], device=device))
            self.truncated.update(torch.tensor([float(row["truncated"]) for row in of_problem], device=device))
            self.labels.update(row["label"] for row in of_problem)
            self.problems.append(summary(of_problem))
            first = of_problem[0]  # show many problems rather than many samples of one
            if len(self.shown[first["correct"]]) < table:
                self.shown[first["correct"]].append(first)

    def values(self, trainer: Trainer) -> dict[str, float]:
        """The metrics over all ranks, by tag."""
        values = {}
        metrics = {f"avg@{self.samples}": self.avg, **{f"pass@{k}": metric for k, metric in self.passed.items()}}
        for tag, metric in metrics.items():
            values[tag], values[f"{tag}_low"], values[f"{tag}_high"] = metric.compute().tolist()
        values |= {"length": float(self.length.compute()), "truncated": float(self.truncated.compute())}
        labels = sum(gather(self.labels), Counter())
        return values | {f"labels/{name}": n / labels.total() for name, n in labels.items() if name is not None}

    def table(self, size: int) -> list[list[str]]:
        """Rows of a table of samples with the columns `SAMPLE`."""
        wrong = self.shown[False][: max(size // 2, size - len(self.shown[True]))]
        return [_sample(row) for row in (*self.shown[True][: size - len(wrong)], *wrong)]


def _sample(row: Row) -> list[str]:
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
    verdict = f"{'✓' if row['correct'] else '✗'} {row['message'] or row['answer']}"
    return [prompt, row["completion"], str(row["expected"]), verdict]


def evaluated_steps(trainer: Trainer) -> int:
    """Optimizer steps of the evaluated weights, for other callbacks that log with an evaluation."""
    return next((evaluation.steps(trainer) for evaluation in callbacks_of(trainer, Evaluation)), trainer.global_step)
