"""Result files of an evaluation: completions, written after each batch so that an interrupted evaluation can be
resumed, and tables.

Files of an evaluation set `<name>`: `<name>.json` (description of the evaluation), `<name>.jsonl` (one line per
completion; further ranks write `<name>-rank<n>.jsonl`) and, at the end, `<name>.parquet` (one row per problem).
`pass_at_k.csv` has the curves of all evaluation sets.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence, Set
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlrt_lightning.evaluation.metrics import mean_with_interval
from rlrt_lightning.objective import pass_at_k
from rlrt_lightning.policy.sharding import whole
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.files import write_whole

if TYPE_CHECKING:
    from rlrt_lightning.evaluation.sets import Evaluated

Row = dict[str, Any]

CURVES = "pass_at_k.csv"
"""File name of the curves of all evaluation sets in a folder."""

FIELDS = ["benchmark", "k", "pass", "low", "high"]
"""Columns of `CURVES`."""


def rows_of(done: Evaluated) -> list[list[Row]]:
    """One row per completion, by problem and sample."""
    rows: list[list[Row]] = [[] for _ in done.problems]
    for rollout in done.rollouts:
        problem, verdict = done.problems[rollout.group], rollout.verdict
        assert verdict is not None
        rows[rollout.group].append(
            {
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
        )
    return rows


def description(data: Any, benchmark: str, weights: str) -> dict[str, Any]:
    """Everything that determines the results. Evaluations with equal descriptions generate the same completions.

    Args:
        data: The data module, after its `setup`.
        benchmark: Name of the evaluation set.
        weights: `fingerprint` of the policy.
    """
    spec = data.benchmarks[benchmark]
    return {
        "weights": weights,
        "samples": spec.samples,
        "sampling": asdict(spec.sampling or data.sampling),
        "seed": data.seed,
        "task": type(spec.task or data.task).__name__,
        "problems": _digest(f"{p.id}\x1f{p.prompt}\x1f{p.answer}" for p in data.benchmark_problems(benchmark)),
    }


def fingerprint(model: nn.Module) -> str:
    """A digest of a model's weights. Not cryptographic: it is built from the sums of the weights' bit patterns."""
    return _digest(f"{name} {list(p.shape)} {_sum_of_bits(whole(p))}" for name, p in model.named_parameters())


def _sum_of_bits(weights: Tensor) -> int:
    """The sum of the values' bit patterns modulo 2^64; unlike a sum of floats, it is the same on every device."""
    patterns = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(weights.detach().view(patterns[weights.element_size()]).sum(dtype=torch.int64))


def _digest(parts: Iterable[str]) -> str:
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode() + b"\x1e")
    return digest.hexdigest()


class Results:
    """The result files of one evaluation set.

    Args:
        folder: The folder, shared with other evaluation sets.
        benchmark: Name of the evaluation set.
        rank: This process's rank; each rank writes its own file.
    """

    def __init__(self, folder: Path, benchmark: str, rank: int = 0) -> None:
        self.folder, self.benchmark = folder, benchmark
        self.path = folder / (f"{benchmark}.jsonl" if rank == 0 else f"{benchmark}-rank{rank}.jsonl")

    def begin(self, described: dict[str, Any], resume: bool = True) -> None:
        """Prepares the folder; called on one rank only. Completions of unfinished problems are removed.

        Args:
            described: `description` of the evaluation.
            resume: Whether to keep existing results; otherwise they are deleted.

        Raises:
            ConfigError: If the folder has results of a different evaluation.
        """
        path = self.folder / f"{self.benchmark}.json"
        if not resume:
            for file in (path, *self._files()):
                file.unlink(missing_ok=True)
        if resume and not path.exists() and (foreign := [*self._files(), *self._tables()]):
            raise ConfigError(
                f"evaluation.results: {foreign[0]} already exists and is not from an evaluation; use another folder"
            )
        if path.exists():
            earlier = _parsed(path.read_text(encoding="utf-8"), {"weights"}) or {}
            differs = [key for key, value in described.items() if earlier.get(key) != value]
            if differs:
                raise ConfigError(
                    f"evaluation.results: {self.folder} has results for {self.benchmark} of a different evaluation "
                    f"(different {', '.join(differs)}); use another folder, or delete this one"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(described, indent=2) + "\n")
        for file in self._files():
            lines = _lines(file)
            complete = self._complete(lines, described["samples"])
            kept = [line for line in lines if (row := _parsed(line)) and row["problem"] in complete]
            if kept != lines:
                write_whole(file, "".join(kept))

    def read(self) -> dict[str, list[Row]]:
        """Reads the completions of finished problems, by problem and sample; call `begin` first."""
        rows: dict[str, list[Row]] = {}
        for file in self._files():
            for line in _lines(file):
                row = json.loads(line)
                rows.setdefault(row["problem"], []).append(row)
        for of_problem in rows.values():
            of_problem.sort(key=lambda row: row["sample"])
        return rows

    def add(self, rows: Sequence[Sequence[Row]]) -> None:
        """Appends completions, a list of rows per problem."""
        text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for of in rows for row in of)
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:  # lone surrogates
            file.write(text)

    def _files(self) -> list[Path]:
        others = self.folder.glob(f"{self.benchmark}-rank*.jsonl")
        return [file for file in (self.folder / f"{self.benchmark}.jsonl", *sorted(others)) if file.exists()]

    def _tables(self) -> list[Path]:
        """Tables in the folder that were not written by an evaluation."""
        curves, table = self.folder / CURVES, self.folder / f"{self.benchmark}.parquet"
        foreign = [curves] if curves.exists() and _lines(curves)[:1] != [",".join(FIELDS) + "\r\n"] else []
        return [*foreign, *([table] if table.exists() else [])]

    @staticmethod
    def _complete(lines: Iterable[str], samples: int) -> set[str]:
        found: dict[str, set[int]] = {}
        for line in lines:
            if row := _parsed(line):
                found.setdefault(row["problem"], set()).add(row["sample"])
        return {problem for problem, numbers in found.items() if len(numbers) == samples}


def summary(rows: Sequence[Row]) -> Row:
    """Summarizes one problem's completions in a row."""
    return {
        "benchmark": rows[0]["benchmark"],
        "problem": rows[0]["problem"],
        "samples": len(rows),
        "correct": sum(row["correct"] for row in rows),
        "reward": sum(row["reward"] for row in rows) / len(rows),
        "tokens": sum(row["tokens"] for row in rows) / len(rows),
        "truncated": sum(row["truncated"] for row in rows) / len(rows),
    }


def write_tables(folder: Path, tables: dict[str, list[Row]]) -> None:
    """Writes `<name>.parquet` with one row per problem, and `pass_at_k.csv` with pass@k and its 95 % confidence
    interval over problems (`low`, `high`) for k = 1, 2, 4, ... and n. Existing curves of other sets are kept.

    Args:
        folder: The folder to write to.
        tables: `summary` of each problem, by evaluation set.
    """
    import pyarrow
    import pyarrow.parquet

    curves: list[Row] = []
    if (folder / CURVES).exists():
        with (folder / CURVES).open(newline="", encoding="utf-8") as file:
            curves = [row for row in csv.DictReader(file) if row["benchmark"] not in tables]
    for benchmark, table in tables.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), folder / f"{benchmark}.parquet")
        curves += [{"benchmark": benchmark, **point} for point in pass_curve(table)]
    with (folder / CURVES).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(curves)


def pass_curve(table: Sequence[Row]) -> list[Row]:
    """pass@k for k = 1, 2, 4, ... and n: rows with `k`, `pass`, and `low` and `high`, the bounds of the 95 % confidence
    interval over problems. n is the smallest number of samples.

    Args:
        table: Rows with `problem`, `samples` and `correct`. Several rows of one problem, such as those of several
            seeds, are averaged; pooling the samples of different policies would not give the pass@k of any of them.
    """
    n = min(row["samples"] for row in table)
    curve = []
    for k in sorted({*(2**i for i in range(n.bit_length())), n}):
        of_problem: dict[str, list[float]] = {}
        for row in table:
            of_problem.setdefault(row["problem"], []).append(float(pass_at_k(row["samples"], row["correct"], k)))
        found = mean_with_interval([fmean(values) for values in of_problem.values()])
        curve.append({"k": k, "pass": found.mean, "low": found.low, "high": found.high})
    return curve


def _lines(file: Path) -> list[str]:
    """The lines of a file with line ends. Not `splitlines`, which also splits at characters that JSON may contain."""
    with file.open(encoding="utf-8", errors="replace", newline="\n") as stream:
        return list(stream)


def _parsed(line: str, needed: Set[str] = frozenset({"problem", "sample"})) -> Row | None:
    """The row of a line; None if the line is incomplete or not a row with the needed fields."""
    try:
        row = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and needed <= row.keys() else None
