"""avg@k and pass@k on held-out problems, and what the completions look like."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, TextIO

import torch
from lightning import Callback, LightningModule, Trainer
from rlrt_lightning.callbacks.boards import run_folder, tensorboards

from rlrt_lightning.datamodule import Evaluated
from rlrt_lightning.errors import ConfigError
from rlrt_lightning.metrics import AvgAtK, PassAtK


class Evaluation(Callback):
    """Counts the verdicts of `validate`, `test` and the validation within `fit`, and shows samples.

    Logs `eval/<benchmark>/avg@n`, `pass@k`, `length`, `truncated` and the share of each label, and writes a table of
    samples to TensorBoard's text page. In `predict` and `test` every completion goes to `completions.jsonl` in the
    run's folder.

    Args:
        ks: Which pass@k to log; null is the number of samples of the benchmark alone.
        table: Samples in the table of each benchmark, half of them wrong where there are so many; 0 for no table.
    """

    def __init__(self, ks: list[int] | None = None, table: int = 8) -> None:
        if ks is not None and (not ks or min(ks) < 1):
            raise ConfigError(f"evaluation.ks is {ks}; it has to name numbers of at least 1, or null")
        if table < 0:
            raise ConfigError(f"evaluation.table is {table}; it has to be 0 or more")
        self.ks = ks
        self.table = table
        self._counts: dict[str, _Counts] = {}
        self._file: TextIO | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that there are enough samples for each k."""
        for name, spec in getattr(trainer, "datamodule").benchmarks.items():  # noqa: B009 - not in Trainer's type
            too_large = [k for k in self.ks or [] if k > spec.samples]
            if too_large:
                raise ConfigError(
                    f"evaluation.ks names {too_large[0]}, but data.benchmarks.{name}.samples is {spec.samples}"
                )

    # -- collecting ------------------------------------------------------------------------------------------------

    def _start(self, *_: Any) -> None:
        self._counts = {}

    def _collect(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        done: Evaluated = outputs
        if done.benchmark not in self._counts:
            self._counts[done.benchmark] = _Counts(self.ks or [done.samples], done.samples, pl_module.device)
        self._counts[done.benchmark].add(done, self.table)
        if not trainer.validating and not trainer.training and not trainer.sanity_checking:
            self._write(trainer, done)

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        for name, counts in self._counts.items():
            values = {f"eval/{name}/{tag}": value for tag, value in counts.values().items()}
            if trainer.sanity_checking:
                # Lightning drops what is logged in its sanity check, which is our measurement before training.
                for logger in trainer.loggers:
                    logger.log_metrics(values, step)
            else:
                pl_module.log_dict(values, sync_dist=False, rank_zero_only=True)
            if self.table:
                for board in tensorboards(trainer):
                    board.add_text(f"samples/{name}", counts.markdown(self.table), step)

    def _write(self, trainer: Trainer, done: Evaluated) -> None:
        if self._file is None:
            folder = run_folder(trainer)
            folder.mkdir(parents=True, exist_ok=True)
            name = "completions" if trainer.world_size == 1 else f"completions-rank{trainer.global_rank}"
            self._file = (folder / f"{name}.jsonl").open("w", encoding="utf-8")
        for rollout in done.rollouts:
            verdict = rollout.verdict
            assert verdict is not None
            problem = done.problems[rollout.group]
            row = {
                "benchmark": done.benchmark,
                "problem": problem.id,
                "sample": rollout.index,
                "prompt": problem.prompt,
                "completion": rollout.text,
                "tokens": len(rollout.response_ids),
                "truncated": rollout.truncated,
                "expected": problem.answer,
                "answer": verdict.answer,
                "reward": verdict.reward,
                "correct": verdict.correct,
                "label": verdict.label,
                "message": verdict.message,
            }
            self._file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        self._file.flush()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Closes the file of completions."""
        if self._file is not None:
            self._file.close()
            self._file = None

    on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = _start  # type: ignore[assignment]
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _collect  # type: ignore[assignment]
    on_validation_epoch_end = on_test_epoch_end = _report


class _Counts:
    """One benchmark's metrics and samples."""

    def __init__(self, ks: list[int], samples: int, device: torch.device) -> None:
        self.samples = samples
        self.avg = AvgAtK().to(device)
        self.passed = {k: PassAtK(k).to(device) for k in ks}
        self.lengths: list[int] = []
        self.truncated = 0
        self.labels: Counter[str] = Counter()
        self.shown: dict[bool, list[tuple[str, str, str, str]]] = {True: [], False: []}

    def add(self, done: Evaluated, table: int) -> None:
        verdicts = [r.verdict for r in done.rollouts if r.verdict is not None]
        correct = torch.tensor([v.correct for v in verdicts], device=self.avg.device).view(-1, done.samples)
        for metric in (self.avg, *self.passed.values()):
            metric.update(correct)
        self.lengths += [len(r.response_ids) for r in done.rollouts]
        self.truncated += sum(r.truncated for r in done.rollouts)
        self.labels.update(v.label for v in verdicts if v.label is not None)
        for rollout, verdict in zip(done.rollouts, verdicts, strict=True):
            rows = self.shown[verdict.correct]
            if len(rows) < table and rollout.index == 0:  # one of each problem shows more than eight of one
                problem = done.problems[rollout.group]
                rows.append(
                    (problem.question, rollout.text, str(problem.answer), verdict.message or str(verdict.answer))
                )

    def values(self) -> dict[str, float]:
        n = len(self.lengths)
        values = {f"avg@{self.samples}": float(self.avg.compute())}
        values |= {f"pass@{k}": float(metric.compute()) for k, metric in self.passed.items()}
        values |= {"length": sum(self.lengths) / n, "truncated": self.truncated / n}
        return values | {f"labels/{label}": count / n for label, count in self.labels.items()}

    def markdown(self, table: int) -> str:
        wrong = self.shown[False][: max(table // 2, table - len(self.shown[True]))]
        rows = [("✓", row) for row in self.shown[True][: table - len(wrong)]] + [("✗", row) for row in wrong]
        lines = ["| | prompt | completion | expected | verdict |", "| --- | --- | --- | --- | --- |"]
        lines += [f"| {mark} | {' | '.join(_cell(text) for text in row)} |" for mark, row in rows]
        return "\n".join(lines)


def _cell(text: str, longest: int = 1500) -> str:
    """Text for a cell of a Markdown table, as code so that nothing in it is taken for Markdown or HTML."""
    text = text if len(text) <= longest else f"{text[: longest // 2]} … {text[-longest // 2 :]}"
    return "`" + text.replace("`", "'").replace("|", "¦").replace("\n", " ⏎ ") + "`"
