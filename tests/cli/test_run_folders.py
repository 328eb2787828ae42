"""Every run has a folder of its own, which its evaluations and resumed runs use."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from rlrt_lightning import __version__
from rlrt_lightning.__main__ import main
from rlrt_lightning.cli.places import Place, logger_settings, make_folder, task_name
from rlrt_lightning.runtime.run_files import end_runs, is_continued
from tests.helpers.command_line import SMALL, TRAIN_ONLY, cli_exit_code, merged_curves
from tests.helpers.processes import ROOT

ONE_EPOCH = ("--trainer.max_epochs=1", *TRAIN_ONLY)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def error_line(capfd: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    return line


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with the same method and seed, and one with another method; the folder of their task."""
    folder = tmp_path_factory.mktemp("runs")
    for flags in ([], [], ["--model.method=GRPO", "--seed_everything=3"]):
        assert cli_exit_code("fit", folder, *ONE_EPOCH, *flags) == 0
    return folder / "last-digit"


def test_a_folder_is_named_by_task_method_and_seed_and_numbered(three_runs: Path) -> None:
    assert names(three_runs) == ["grpo-3", "rlrt-0", "rlrt-0-2"]
    for run in three_runs.iterdir():
        assert {"config.yaml", "checkpoints"} <= set(names(run))
        assert len(list(run.glob("events.out.tfevents.*"))) == 1


def test_evaluations_and_resumed_runs_use_the_folder_of_the_newest_run_of_the_same_name(
    three_runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "last-digit"
    shutil.copytree(three_runs, folder)
    for _ in range(2):
        assert cli_exit_code("validate", tmp_path, "--ckpt_path=last") == 0
        assert "files: " in capfd.readouterr().out
    run = folder / "rlrt-0-2"
    assert names(run / "evaluation") == ["step-2", "step-2-2"]
    for name in names(run / "evaluation"):
        assert {"config.yaml", "heldout.jsonl", "pass_at_k.csv"} <= set(names(run / "evaluation" / name))
    assert cli_exit_code("fit", tmp_path, *TRAIN_ONLY, "--trainer.max_epochs=2", "--ckpt_path=last") == 0
    assert names(folder) == ["grpo-3", "rlrt-0", "rlrt-0-2"], "no folder for the resumed run"
    assert names(run / "checkpoints") == ["epoch-1.ckpt", "last.ckpt"], "also where the folder was moved"
    assert {"config.yaml", "config-2.yaml"} <= set(names(run))
    assert cli_exit_code("validate", tmp_path, "--ckpt_path=last", "--seed_everything=7") == 2
    line = error_line(capfd)
    assert f"there is no checkpoint in {folder / 'rlrt-7'}" in line
    assert "are grpo-3, rlrt-0, rlrt-0-2" in line


@pytest.mark.parametrize(
    ("command", "flags", "written"),
    [
        ("validate", ["--trainer.limit_val_batches=1"], "evaluation"),
        ("fit", ["--trainer.callbacks+=HFExport"], "export"),
    ],
)
def test_the_config_of_a_run_evaluates_it_and_exports_it(
    command: str, flags: list[str], written: str, three_runs: Path, tmp_path: Path
) -> None:
    """As printed at the end of the run. It has all settings, null where they are not set."""
    folder = tmp_path / "last-digit"
    shutil.copytree(three_runs, folder)
    config = folder / "grpo-3" / "config.yaml"
    assert "callbacks: null" in config.read_text()
    where = f"--trainer.logger.save_dir={tmp_path}"
    assert main([command, f"--config={config}", "--ckpt_path=last", where, *flags]) == 0
    assert (folder / "grpo-3" / written).is_dir()


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.policy.path=/nowhere"],
        ["--data.sampling.stop=['']"],
        ["--checkpoint.monitor=eval/heldout/nothing"],
        ["--data.engine=VllmServerEngine", "--data.engine.urls=['http://127.0.0.1:9']", "--data.engine.patience_s=0.1"],
    ],
    ids=lambda flags: flags[0].split("=")[0],
)
def test_a_run_that_fails_to_start_leaves_no_folder(
    flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    assert cli_exit_code("fit", root, *ONE_EPOCH, *flags, f"--trainer.default_root_dir={tmp_path}") == 2
    assert error_line(capfd)
    assert not list(root.rglob("*"))


def test_a_fast_dev_run_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli_exit_code("fit", tmp_path / "runs", "--trainer.fast_dev_run=true") == 0
    assert names(tmp_path) == []


def test_without_a_logger_the_folder_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written to the current folder itself."""
    monkeypatch.chdir(tmp_path)
    assert cli_exit_code("fit", tmp_path, *ONE_EPOCH, "--trainer.logger=false") == 0
    assert names(tmp_path) == ["runs"]
    assert {"config.yaml", "checkpoints", "signal"} <= set(names(tmp_path / "runs" / "last-digit" / "rlrt-0"))


def test_a_logger_with_a_version_keeps_it(tmp_path: Path) -> None:
    assert cli_exit_code("fit", tmp_path, *ONE_EPOCH, "--trainer.logger.name=mine", "--trainer.logger.version=7") == 0
    assert names(tmp_path) == ["mine"]
    assert names(tmp_path / "mine") == ["version_7"]


def test_a_resumed_run_keeps_the_metrics_of_its_beginning(tmp_path: Path) -> None:
    """CSVLogger would delete its file of them."""
    one = f"init_args: {{save_dir: {tmp_path}}}"
    loggers = f"[{{class_path: TensorBoardLogger, {one}}}, {{class_path: CSVLogger, {one}}}]"
    args = ["fit", f"--config={ROOT / 'configs' / 'rlrt.yaml'}", *SMALL, *TRAIN_ONLY, f"--trainer.logger={loggers}"]
    assert main([*args, "--trainer.max_epochs=1"]) == 0
    assert main([*args, "--trainer.max_epochs=2", "--ckpt_path=last"]) == 0
    (run,) = (tmp_path / "last-digit").iterdir()
    assert {"metrics.csv", "metrics-2.csv"} <= set(names(run))
    assert len(merged_curves(tmp_path)["train/loss"]) == 2


# -- the choice of a folder ----------------------------------------------------------------------------------------


def checkpoint(path: Path, step: int) -> str:
    """Writes a checkpoint that holds only what the choice of a folder needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    empty: dict[str, Any] = {"pytorch-lightning_version": "2", "loops": {}, "state_dict": {}, "lr_schedulers": []}
    torch.save({**empty, "global_step": step}, path)
    return str(path)


def test_only_the_newest_checkpoint_of_a_run_continues_in_its_folder(tmp_path: Path) -> None:
    place, run = Place(tmp_path, "task", "rlrt-0"), tmp_path / "task" / "rlrt-0"
    early = checkpoint(run / "checkpoints" / "epoch-0.ckpt", 2)
    assert make_folder("fit", place, early) == run
    assert is_continued(run)
    late = checkpoint(run / "checkpoints" / "last.ckpt", 4)
    assert make_folder("fit", place, early) == tmp_path / "task" / "rlrt-0-2", "it would overwrite later epochs"
    assert make_folder("fit", place, late) == run
    assert make_folder("fit", Place(tmp_path, "task", "rlrt-1"), late) == tmp_path / "task" / "rlrt-1"
    assert make_folder("validate", place, late) == run / "evaluation" / "step-4"
    assert make_folder("validate", place, None) == tmp_path / "task" / "evaluation"
    elsewhere = checkpoint(tmp_path / "saved" / "last.ckpt", 4)
    assert make_folder("validate", place, elsewhere) == tmp_path / "task" / "evaluation-2"
    end_runs()
    assert sorted(path.name for path in (tmp_path / "task").iterdir()) == ["rlrt-0"], "none was used"


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        ("rlrt_lightning.LastDigit", {}, "last-digit"),
        ("rlrt_lightning.DatasetTask", {"train": "data/My Sums.v2.jsonl"}, "my-sums.v2"),
        ("rlrt_lightning.DatasetTask", {"train": "openai/gsm8k:main:train"}, "gsm8k"),
        ("rlrt_lightning.DatasetTask", {"train": None, "heldout": "data/aime/"}, "aime"),
        ("rlrt_lightning.ReasoningGym", {"name": "chain_sum"}, "chain_sum"),
        ("my_tasks.SumsOfThree", {}, "sums-of-three"),
    ],
)
def test_a_task_has_a_short_name(kind: str, settings: dict[str, Any], name: str) -> None:
    assert task_name(Namespace(class_path=kind, init_args=Namespace(**settings))) == name


def test_loggers_keep_the_local_files_of_each_run_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    place, folder = Place(tmp_path, "task", "rlrt-0"), tmp_path / "task" / "rlrt-0-2"
    wandb = logger_settings(WandbLogger, {"name": None, "save_dir": ".", "project": None}, place, folder)
    assert wandb == {"name": "rlrt-0-2", "save_dir": str(folder), "project": "task"}
    assert logger_settings(WandbLogger, {"name": "mine", "save_dir": "."}, place, folder)["name"] == "mine"
    mlflow = {"experiment_name": "lightning_logs", "run_name": None, "save_dir": "./mlruns"}
    found = logger_settings(MLFlowLogger, mlflow, place, folder)
    assert found == {"experiment_name": "task", "run_name": "rlrt-0-2", "save_dir": str(tmp_path / "mlruns")}
    for kind in (TensorBoardLogger, CSVLogger):
        made = kind(**logger_settings(kind, {"save_dir": "runs", "name": None, "version": None}, place, folder))
        assert Path(made.log_dir) == folder


# -- without a run -------------------------------------------------------------------------------------------------


def test_fit_without_a_config_names_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", f"--trainer.logger.save_dir={tmp_path}"]) == 2
    assert "python -m rlrt_lightning fit --config configs/rlrt.yaml" in error_line(capfd)
    assert names(tmp_path) == []


def test_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlrt_lightning {__version__}\n"
