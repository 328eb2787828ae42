"""The runs and the tables of benchmarks/language_model.py, from synthetic runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import language_model as lm
from benchmarks.language_model_results import Results, common, plot, plot_instruments, tables
from rlrt_lightning.analysis import events, reflection
from tests.helpers.command_line import ParsingCli
from tests.helpers.marks import slow_except

STEPS = [2, 4, 6, 8]
TEACHER = {
    "teacher/accuracy": [(0, 0.4), (4, 0.6), (8, 0.8)],
    "teacher/student_accuracy": [(0, 0.2), (4, 0.2), (8, 0.2)],
    "teacher/with_context": [(0, 0.5), (4, 0.5), (8, 0.5)],
    "teacher/tokens_words": [(0, 0.4), (4, 0.4), (8, 0.4)],
    "teacher/share_words": [(0, 0.3), (4, 0.3), (8, 0.3)],
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "model"


@pytest.fixture
def plan(model: Path) -> lm.Plan:
    return lm.Plan(model, "two-numbers", [])


def finish(arguments: list[str], name: str, threads: int, started: list[list[str]]) -> None:
    """Leaves the files that training, or the evaluation after it, leaves."""
    started.append(arguments)
    flags = dict(flag.split("=", 1) for flag in arguments if "=" in flag)
    if "fit" in arguments:
        folder = Path(flags["--trainer.logger.save_dir"]) / "run" / "rlrt-0"
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / "last.ckpt").touch()
        (folder / "events.out.tfevents.1").touch()
    elif "validate" in arguments:
        correct = [16 if "rlrt" in str(flags["--evaluation.results"]) else 8, 0]
        folder = Path(flags["--evaluation.results"])
        folder.mkdir()
        table = pa.table({"problem": ["sum-0", "sum-1"], "samples": [64, 64], "correct": correct})
        pq.write_table(table, folder / "heldout.parquet")
    elif "reflection" in arguments:
        Path(flags["--out"]).mkdir()
        rates = [
            {"kind": kind, "text": text, "where": where, "problems": 3, "flipped": 0.5, "low": 0.4, "high": 0.7}
            for kind in ("hard", "easy")
            for text in ("Wait", "")
            for where in reflection.WHERE
        ]
        lm.write_csv(Path(flags["--out"]) / "reflection_summary.csv", rates)
    else:
        Path(flags["--out"]).mkdir()
        rows = [{"js": 0.05 * n, "base_probability": 0.1 * n, "overlap": [1.0, 0.5]} for n in range(8)]
        pq.write_table(pa.Table.from_pylist(rows), Path(flags["--out"]) / "shift.parquet")


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """RLRT's scores exceed GRPO's by 0.2 with seed 1, and by 0.3 with seed 2."""
    seed = int(next(part for part in run.parts if part.startswith("seed-"))[-1])
    better = (0.1 + 0.1 * seed) * ("rlrt" in run.parts)
    return {
        "rollout/reward": [(step, 0.1 * step / 2 + better) for step in STEPS],
        **{
            tag: [(step, 3.0) for step in STEPS]
            for tag in ("rollout/length", "train/entropy", "time/rollout", "time/train")
        },
        "eval/heldout/avg@8": [(0, 0.1), (4, 0.3 + better), (8, 0.5 + better)],
        "eval/heldout/pass@8": [(0, 0.2), (4, 0.5), (8, 0.6)],
        "eval/heldout/length": [(0, 9.0), (4, 8.0), (8, 7.0)],
        **(TEACHER if "rlrt" in run.parts else {}),
    }


def test_the_tables_pair_runs_with_the_same_seed(
    tmp_path: Path, plan: lm.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(lm, "execute", lambda arguments, name, threads, log: finish(arguments, name, threads, started))
    monkeypatch.setattr(events, "scalars", curves)
    runs = [lm.Run(method, seed) for seed in (1, 2) for method in ("GRPO", "RLRT")]
    for run in runs:
        lm.train(run, tmp_path / "out", plan, 1)
    assert lm.collect([*runs, lm.Run("RLSD", 1)], tmp_path / "out", tmp_path / "results")
    found = tables(Results.read(tmp_path / "results"))
    # The differences are 0.2 and 0.3: 0.25 ± 12.706 * 0.0707 / sqrt(2).
    assert found.count("+0.250 (-0.385 to +0.885)") == 2
    assert "| RLRT | 2 | 0.100 ± 0.000 | 0.550 ± 0.071 | 0.750 ± 0.071 |" in found
    assert "| GRPO | 1, 2 | 0.062 (" in found.split("pass@k at the end")[1], "k = 1: a share of 8 / 64 and one of 0"
    assert "| RLRT | 1, 2 | 0.125 (" in found.split("pass@k at the end")[1]
    assert found.endswith("| +0.000 (+0.000 to +0.000) |"), "one of two problems is solved by every run"
    reversed_sign = tables(Results.read(tmp_path / "results"), "RLRT")
    assert reversed_sign.count("-0.250 (-0.885 to +0.385)") == 2
    assert "avg@8 end minus that of RLRT" in reversed_sign
    assert Results.read(tmp_path / "results", methods=["RLRT"]).methods == ["RLRT"]
    assert "| RLRT | 2 | 0.50 | 0.20 | 0.60 | nan | nan | 0.40 | 0.30 |" in found
    png, svg = plot(Results.read(tmp_path / "results"), tmp_path / "figures")
    assert png.stat().st_size > 10_000
    assert all(title in svg.read_text() for title in ("training reward", "pass@k at the end"))
    rows = Results.read(tmp_path / "results").epochs
    assert len(rows) == 4 * len(STEPS)
    assert rows[0]["seconds"] == 6
    assert rows[0]["context_of_correct"] != rows[0]["context_of_correct"], "NaN for a metric that GRPO does not have"
    assert not list(tmp_path.glob("out/**/*.ckpt")), "the weights of finished runs are deleted"


def test_runs_are_compared_at_the_age_of_the_youngest() -> None:
    rows = [{"method": "GRPO", "seed": seed, "epoch": epoch} for seed in (1, 2) for epoch in range(3 + seed)]
    assert [row["epoch"] for row in common(rows)] == [0, 1, 2, 3] * 2


def test_what_finished_is_kept_if_another_run_fails(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names: list[str] = []

    def fail_rlrt(arguments: list[str], name: str, threads: int, log: Path) -> None:
        names.append(name)
        if name.startswith("RLRT"):
            raise SystemExit("RLRT failed")
        finish(arguments, name, threads, [])

    monkeypatch.setattr(lm, "execute", fail_rlrt)
    monkeypatch.setattr(events, "scalars", curves)
    places = [f"--model={model}", f"--out={tmp_path / 'out'}", f"--results={tmp_path / 'results'}"]
    monkeypatch.setattr("sys.argv", ["language_model.py", *places, "--seeds=1-2", "--methods", "RLRT", "GRPO"])
    with pytest.raises(SystemExit, match="RLRT failed"):
        lm.main()
    assert {(row["method"], row["seed"]) for row in Results.read(tmp_path / "results").epochs} == {
        ("GRPO", 1),
        ("GRPO", 2),
    }
    analysed = [name for name in names if name.startswith(tuple(lm.INSTRUMENTS))]
    assert analysed == ["reflection of GRPO, seed 1", "shift of GRPO, seed 1"]
    plots = plot_instruments(tmp_path / "results", tmp_path / "plots")
    assert [path.relative_to(tmp_path / "plots") for path in plots if path.suffix == ".svg"] == [
        Path("grpo/reflection.svg"),
        Path("grpo/shift.svg"),
    ]
    assert "“Wait”" in plots[1].read_text()


def test_the_runs_of_two_methods_differ_in_their_settings() -> None:
    """But for the one that measures how much two runs of the same settings differ."""
    plan = lm.Plan(Path("model"), "two-numbers", ["--model.policy.path=embedded"])
    cli = {
        method: ParsingCli(["fit", *lm.settings(lm.Run(method, 3), plan)])
        for method in ("GRPO", "GRPO with std", "GRPO repeated")
    }
    found = {method: str(each.config.fit.model.method) for method, each in cli.items()}
    assert found["GRPO"] == found["GRPO repeated"] != found["GRPO with std"]


def test_a_run_resumes_from_its_last_checkpoint_and_is_not_repeated(
    tmp_path: Path, plan: lm.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    run = lm.Run("GRPO with std", 1)

    def interrupt(arguments: list[str], name: str, threads: int, log: Path) -> None:
        finish(arguments, name, threads, started)
        if len(started) == 1:
            raise SystemExit("interrupted")

    monkeypatch.setattr(lm, "execute", interrupt)
    with pytest.raises(SystemExit, match="interrupted"):
        lm.train(run, tmp_path, plan, 1)
    lm.train(run, tmp_path, plan, 1)
    lm.train(run, tmp_path, plan, 1)
    first, resumed, evaluation = started
    checkpoint = f"--ckpt_path={run.folder(tmp_path)}/run/rlrt-0/checkpoints/last.ckpt"
    assert not any(flag.startswith("--ckpt_path") for flag in first)
    assert set(resumed) - set(first) == {checkpoint}
    assert {"validate", checkpoint, "--data.benchmarks.heldout.samples=64"} <= set(evaluation)
    with pytest.raises(SystemExit, match="was trained with other settings or weights; set --out to another folder"):
        lm.train(run, tmp_path, plan._replace(extra=["--trainer.max_epochs=2"]), 1)
    with pytest.raises(SystemExit, match="was trained with other settings or weights"):
        lm.train(run, tmp_path, plan._replace(experiment="confirmation"), 1)
    (plan.model / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(SystemExit, match="was trained with other settings or weights"):
        lm.train(run, tmp_path, plan, 1)


def test_the_runs_on_cpu_cores_differ_in_what_two_cores_need(plan: lm.Plan) -> None:
    flags = lm.settings(lm.Run("RLRT", 3), plan._replace(experiment="two-numbers-cpu"))
    settings: Any = ParsingCli(["fit", *flags]).config.fit
    assert settings.data.task.init_args.config["max_terms"] == 2
    assert settings.data.engine.init_args.dtype is None
    assert (settings.trainer.precision, settings.trainer.max_epochs, settings.data.rescore) == ("32-true", 40, False)


def test_the_confirmation_differs_in_its_task_and_in_what_two_cores_need(plan: lm.Plan) -> None:
    flags = lm.settings(lm.Run("RLRT", 3), plan._replace(experiment="confirmation"))
    settings: Any = ParsingCli(["fit", *flags]).config.fit
    assert settings.data.task.init_args.config == {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    assert settings.data.engine.init_args.dtype is None
    assert (settings.trainer.precision, settings.trainer.max_epochs, settings.data.rescore) == ("32-true", 40, False)
    assert (settings.data.prompts_per_epoch, settings.data.minibatches) == (8, 2)


def test_a_failure_is_told_even_if_no_run_is_finished(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(arguments: list[str], name: str, threads: int, log: Path) -> None:
        raise SystemExit(f"{name}: out of memory")

    monkeypatch.setattr(lm, "execute", fail)
    monkeypatch.setattr("sys.argv", ["language_model.py", f"--model={model}", f"--out={tmp_path / 'out'}"])
    with pytest.raises(SystemExit, match="GRPO, seed 300: out of memory"):
        lm.main()


@pytest.mark.parametrize("method", slow_except(lm.METHODS, "GRPO with std", "RLCSD"))
def test_the_settings_of_each_run_are_valid(method: str, plan: lm.Plan) -> None:
    settings: Any = ParsingCli(["fit", *lm.settings(lm.Run(method, 3), plan)]).config.fit
    assert settings.seed_everything == 3
    assert settings.trainer.max_epochs == 100
    assert settings.data.task.init_args.config["min_terms"] == 2
    classes = {"RLRT-all": "RLRT", "teacher-predicted": "RLSD", "GRPO + entropy": "EntropyBonus"}
    assert settings.model.method.class_path.rsplit(".", 1)[-1] == classes.get(method, method.split()[0])
