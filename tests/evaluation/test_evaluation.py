"""Evaluations from the command line: their result files, and how an interrupted one resumes."""

from __future__ import annotations

import copy
import csv
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from lightning import Trainer
from torch import nn

from rlrt_lightning import LastDigit, Policy, RLRTModule, RolloutDataModule, Sampling, Teacher
from rlrt_lightning.callbacks import Evaluation
from rlrt_lightning.datamodule import Benchmark
from rlrt_lightning.evaluation import sets
from rlrt_lightning.evaluation.results import description, fingerprint, pass_curve
from rlrt_lightning.evaluation.sets import EvaluationLoader
from rlrt_lightning.tasks import Problem
from tests.helpers.command_line import SMALL as SMALL_DATA
from tests.helpers.command_line import cli_exit_code, evaluation_scalars, scalars
from tests.helpers.processes import ROOT, run_cli

SMALL = ("--data.eval_prompts=2", "--data.sampling.max_new_tokens=12")


def rows(folder: Path, benchmark: str = "heldout") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{benchmark}.jsonl").read_text(encoding="utf-8").splitlines()]


def evaluate(folder: Path, *flags: str, name: str = "validate") -> dict[str, list[tuple[int, float]]]:
    """Runs an evaluation into `folder/results`; the metrics that it logs."""
    assert cli_exit_code(name, folder, f"--evaluation.results={folder / 'results'}", *SMALL, *flags) == 0
    return {tag: curve for tag, curve in evaluation_scalars(folder).items() if tag.startswith("eval/")}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder / "results", evaluate(folder)


@pytest.mark.smoke
def test_an_evaluation_writes_completions_problems_and_curves(uninterrupted: tuple[Path, dict[str, Any]]) -> None:
    folder, metrics = uninterrupted
    done = rows(folder)
    assert len(done) == 6 * 8
    table = pyarrow.parquet.read_table(folder / "heldout.parquet").to_pylist()
    assert len(table) == 6
    for problem in table:
        mine = [row for row in done if row["problem"] == problem["problem"]]
        assert problem["samples"] == len(mine) == 8
        assert problem["correct"] == sum(row["correct"] for row in mine)
        assert problem["tokens"] == sum(row["tokens"] for row in mine) / 8
    with (folder / "pass_at_k.csv").open() as file:
        curve = [row for row in csv.DictReader(file) if row["benchmark"] == "heldout"]
    assert [int(point["k"]) for point in curve] == [1, 2, 4, 8]
    assert float(curve[0]["pass"]) == pytest.approx(metrics["eval/heldout/avg@8"][0][1])
    assert float(curve[-1]["pass"]) == pytest.approx(metrics["eval/heldout/pass@8"][0][1])
    for bound in ("low", "high"):
        assert float(curve[0][bound]) == pytest.approx(metrics[f"eval/heldout/avg@8_{bound}"][0][1])
        assert float(curve[-1][bound]) == pytest.approx(metrics[f"eval/heldout/pass@8_{bound}"][0][1])


def test_an_interrupted_evaluation_draws_only_what_is_missing(
    uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, metrics = uninterrupted
    results = tmp_path / "results"
    results.mkdir()
    (results / "heldout.json").write_text((whole / "heldout.json").read_text())
    lines = (whole / "heldout.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    # Two problems are complete; the third has one completion and half of another.
    (results / "heldout.jsonl").write_text("".join(lines[:17]) + lines[17][:25], encoding="utf-8")

    drawn: list[str] = []
    original = RolloutDataModule._roll_out

    def watch(self: Any, task: Any, questions: Any, *args: Any) -> Any:
        drawn.extend(problem.id for problem in questions.problems)
        return original(self, task, questions, *args)

    monkeypatch.setattr(RolloutDataModule, "_roll_out", watch)
    assert evaluate(tmp_path) == metrics
    order = lambda row: (row["problem"], row["sample"])  # noqa: E731
    assert sorted(rows(results), key=order) == sorted(rows(whole), key=order)
    assert (results / "heldout.parquet").read_bytes() == (whole / "heldout.parquet").read_bytes()
    heldout, longer = (list(dict.fromkeys(r["problem"] for r in rows(whole, b))) for b in ("heldout", "longer"))
    assert drawn == heldout[2:] + longer, "only what was missing"

    drawn.clear()
    assert evaluate(tmp_path) == metrics
    assert not drawn, "nothing was missing"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--data.sampling.temperature=0.5", "sampling"),
        pytest.param("--data.benchmarks.heldout.samples=4", "samples", marks=pytest.mark.slow),
        pytest.param("--seed_everything=7", "seed", marks=pytest.mark.slow),
        ("--data.benchmarks.heldout.limit=5", "problems"),
    ],
)
def test_results_of_different_settings_are_not_mixed(
    flag: str,
    message: str,
    uninterrupted: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, _ = uninterrupted
    assert cli_exit_code("validate", tmp_path, f"--evaluation.results={folder}", *SMALL, flag) == 2
    err = capfd.readouterr().err
    assert "evaluation.results" in err
    assert message in err
    assert len(rows(folder)) == 6 * 8


def test_results_of_different_weights_are_not_mixed(
    uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli_exit_code("fit", tmp_path, "--trainer.max_epochs=1") == 0
    folder, _ = uninterrupted
    assert cli_exit_code("validate", tmp_path, f"--evaluation.results={folder}", "--ckpt_path=last", *SMALL) == 2
    assert "weights" in capfd.readouterr().err


def test_every_weight_and_every_answer_identifies_an_evaluation() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, dtype=torch.bfloat16)
    before = fingerprint(layer)
    assert fingerprint(copy.deepcopy(layer)) == before
    layer.weight.data[3, 5] = torch.nextafter(layer.weight.data[3, 5], torch.tensor(9.0, dtype=torch.bfloat16))
    assert fingerprint(layer) != before

    def described(answer: str) -> dict[str, Any]:
        data = RolloutDataModule(LastDigit())
        data._eval_problems = {"heldout": [Problem("a", "1+1=", answer)]}
        return description(data, "heldout", before)

    assert described("2") == described("2") != described("3")


def test_each_evaluation_of_a_script_has_a_folder(tmp_path: Path) -> None:
    """As in a script that validates before and after training: the weights change, and the trainer stays the same."""
    benchmarks = {"heldout": Benchmark(samples=2, limit=2)}
    data = RolloutDataModule(sampling=Sampling(max_new_tokens=12), prompts_per_epoch=4, benchmarks=benchmarks)
    module = RLRTModule(Policy(), Teacher())
    trainer = Trainer(logger=False, callbacks=[Evaluation()], enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.validate(module, datamodule=data, verbose=False)
    first = rows(tmp_path / "evaluation" / "step-0")
    with torch.no_grad():
        module.policy.model.get_input_embeddings().weight += 1.0
    trainer.validate(module, datamodule=data, verbose=False)
    second = rows(tmp_path / "evaluation" / "step-0-2")
    assert len(first) == len(second) == 4
    assert [row["completion"] for row in first] != [row["completion"] for row in second]


def test_a_results_folder_that_cannot_be_written_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results").write_text("a file")
    assert cli_exit_code("validate", tmp_path, f"--evaluation.results={tmp_path / 'results'}", *SMALL) == 2
    assert "error: evaluation.results: cannot write to" in capfd.readouterr().err


def test_predict_writes_completions_with_rewards(uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    assert cli_exit_code("predict", tmp_path, f"--evaluation.results={tmp_path / 'results'}", *SMALL) == 0
    assert rows(tmp_path / "results") == rows(uninterrupted[0])
    assert {row["reward"] for row in rows(tmp_path / "results")} == {0.0, 1.0}


def test_fit_writes_no_completions(tmp_path: Path) -> None:
    assert cli_exit_code("fit", tmp_path, "--trainer.max_epochs=1", *SMALL) == 0
    assert not list(tmp_path.glob("**/*.jsonl"))


def test_pass_at_k_curves_reach_256_samples_and_never_fall(tmp_path: Path) -> None:
    flags = ("--data.benchmarks={heldout: {samples: 256, limit: 2}}", "--data.sampling.max_new_tokens=12")
    assert cli_exit_code("validate", tmp_path, f"--evaluation.results={tmp_path / 'results'}", *flags) == 0
    with (tmp_path / "results" / "pass_at_k.csv").open() as file:
        curve = [(int(row["k"]), float(row["pass"])) for row in csv.DictReader(file)]
    assert [k for k, _ in curve] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert all(a <= b for (_, a), (_, b) in pairwise(curve))


def test_the_curve_ends_at_the_fewest_samples_of_any_problem() -> None:
    table = [{"problem": "a", "samples": 6, "correct": 1}, {"problem": "b", "samples": 9, "correct": 9}]
    assert [point["k"] for point in pass_curve(table)] == [1, 2, 4, 6]
    assert pass_curve(table)[0]["pass"] == pytest.approx((1 / 6 + 1) / 2)


def test_ranks_take_equally_many_batches_and_each_problem_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "world_size", lambda: 4)
    for size in (1, 4, 5, 9, 16):
        problems, taken, counts = LastDigit().problems("heldout")[:size], [], set()
        for rank in range(4):
            monkeypatch.setattr(sets, "rank", lambda rank=rank: rank)
            loader = EvaluationLoader("heldout", 2, problems, 2, set(), lambda numbers: [])
            counts.add(len(loader))
            taken += [problem.id for batch in loader for problem in batch.problems]
        assert sorted(taken) == sorted(problem.id for problem in problems)
        assert len(counts) == 1


@pytest.mark.slow
def test_two_ranks_give_the_same_results_as_one(uninterrupted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """With ranks that Lightning launches; tests/runtime/test_strategies.py has the same test with torchrun's."""
    whole, metrics = uninterrupted
    flags = ("--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.accelerator=cpu")
    args = [f"--config={ROOT / 'configs' / 'rlrt.yaml'}", *SMALL_DATA, *SMALL, *flags]
    args += [f"--evaluation.results={tmp_path / 'results'}", f"--trainer.logger.save_dir={tmp_path}"]
    run_cli("validate", *args)
    for name in ("heldout.parquet", "longer.parquet", "pass_at_k.csv"):
        assert (tmp_path / "results" / name).read_bytes() == (whole / name).read_bytes()
    logged = {tag: curve for tag, curve in scalars(tmp_path).items() if tag.startswith("eval/")}
    assert logged.keys() == metrics.keys()
    for tag, curve in logged.items():
        assert curve[0][1] == pytest.approx(metrics[tag][0][1], rel=1e-5), tag


@pytest.mark.filterwarnings("ignore:.*prompts of data.* are longer")
def test_the_papers_evaluation_sets_run_from_one_config(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`local.yaml` replaces the evaluation sets of `rlrt.yaml` and reads its files from the folder data/."""
    (tmp_path / "data").symlink_to(shared / "data")
    monkeypatch.chdir(tmp_path)
    flags = [f"--data.benchmarks.{name}.limit=1" for name in ("aime24", "aime25", "amc23", "math500")]
    flags += [f"--data.benchmarks.{name}.samples=2" for name in ("aime24", "aime25", "amc23", "math500")]
    flags += ["--data.sampling.max_new_tokens=2", f"--trainer.logger.save_dir={tmp_path}"]
    from rlrt_lightning.__main__ import main

    configs = [f"--config={ROOT / 'configs' / name}.yaml" for name in ("rlrt", "evaluation/local")]
    assert main(["validate", *configs, *flags, "--trainer.enable_progress_bar=false"]) == 0
    assert {"eval/aime24/avg@2", "eval/math500/pass@2"} <= set(scalars(tmp_path))
