"""Runs that are stopped or killed, and how they resume."""

from __future__ import annotations

import io
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback

from rlrt_lightning.runtime.checkpoints import WEIGHTS_ONLY_VARIABLE, WholeCheckpointIO, newest, no_code, problem
from rlrt_lightning.runtime.errors import ConfigError
from tests.helpers.command_line import assert_continued, cli_exit_code, scalars
from tests.helpers.processes import ROOT

ONE_KILL = ["--epochs=3", "--phases=update", "--seed=5"]  # with this seed in the second epoch, after a checkpoint
FLAGS = [
    "--trainer.max_epochs=4",
    "--trainer.accumulate_grad_batches=2",
    "--checkpoint.every_n_epochs=4",
    "--teacher_refresh.every_n_epochs=2",
    "--teacher_refresh.ema_decay=0.5",
    "--model.method.lam_decay_steps=10",
    "--data.rescore=true",
    "--data.benchmarks={heldout: {samples: 2, limit: 6}}",
]


class Sends(Callback):
    """Sends SIGTERM in the middle of a phase of the second epoch.

    Args:
        phase: rollout, teacher, update, validation or save.
    """

    number = signal.SIGTERM

    def __init__(self, phase: str) -> None:
        self.phase = phase

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        data, teacher = trainer.datamodule, pl_module.teacher
        generate, score = data.engine.generate, teacher.score

        def generates(*args: Any) -> Iterator[Any]:
            for i, rollout in enumerate(generate(*args)):
                yield rollout
                if i == 2 and trainer.current_epoch == 1:
                    self.send("validation" if trainer.validating else "rollout")

        def scores(*args: Any, **kwargs: Any) -> Any:
            if trainer.current_epoch == 1:
                self.send("teacher")
            return score(*args, **kwargs)

        data.engine.generate, teacher.score = generates, scores

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 0:
            self.send("update")

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self.send("save")

    def send(self, phase: str) -> None:
        if phase == self.phase:
            self.phase = ""
            os.kill(os.getpid(), self.number)


def exit_code_of_stopped_run(folder: Path, phase: str, *flags: str) -> int:
    """The exit code of a run that receives SIGTERM in a phase."""
    sends = ["--trainer.callbacks+=tests.runtime.test_stopping.Sends", f"--trainer.callbacks.phase={phase}"]
    with pytest.raises(SystemExit) as end:
        cli_exit_code("fit", folder, *FLAGS, *sends, *flags)
    return int(end.value.code or 0)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # `validate` has other settings
def test_a_stopped_run_resumes_where_it_stopped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """SIGTERM in one phase after another, with regular checkpoints only every four epochs."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli_exit_code("fit", whole, *FLAGS) == 0
    lines = []
    for i, phase in enumerate(("rollout", "teacher", "update", "validation")):
        assert exit_code_of_stopped_run(cut, phase, *(["--ckpt_path=last"] if i else [])) == 143
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("stopped by")]
        lines.append(line)
        if phase == "update":
            assert cli_exit_code("fit", cut, *FLAGS, "--ckpt_path=last", "--trainer.accumulate_grad_batches=1") == 2
            assert "1 ranks with trainer.accumulate_grad_batches=2; use the same settings" in capfd.readouterr().err
            assert cli_exit_code("validate", cut, *FLAGS[3:5], "--ckpt_path=last") == 0
    assert "stopped by SIGTERM: saved after 2 optimizer steps as " in lines[0]
    assert "resume with --ckpt_path last" in lines[0]
    assert "all 2 optimizer steps are saved" in lines[1], "nothing new to save"
    assert "after 3 optimizer steps" in lines[2], "in the middle of the epoch"
    assert "after 4 optimizer steps" in lines[3]
    assert cli_exit_code("fit", cut, *FLAGS, "--ckpt_path=last") == 0
    assert_continued(cut, whole)


@pytest.mark.slow
def test_a_run_with_a_limit_of_tokens_per_pass_resumes_within_an_epoch(tmp_path: Path) -> None:
    """The number of micro-batches of an epoch is that of its rollouts, also after a resume."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["--trainer.accumulate_grad_batches=1", "--data.tokens_per_pass=100", "--data.max_prompt_tokens=64"]
    assert cli_exit_code("fit", whole, *FLAGS, *flags) == 0
    assert exit_code_of_stopped_run(cut, "update", *flags) == 143
    (last,) = cut.glob("**/last.ckpt")
    assert torch.load(last, weights_only=True)["RolloutDataModule"]["accumulate"] > 1
    assert cli_exit_code("fit", cut, *FLAGS, *flags, "--ckpt_path=last") == 0
    assert_continued(cut, whole)


def test_a_signal_during_a_save_takes_effect_after_the_save(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of_stopped_run(tmp_path, "save", "--checkpoint.every_n_epochs=1") == 143
    assert "all 2 optimizer steps are saved" in capfd.readouterr().err
    (folder,) = tmp_path.glob("last-digit/rlrt-0/checkpoints")
    assert sorted(path.name for path in folder.iterdir()) == ["epoch-0.ckpt", "last.ckpt"]
    assert problem(folder / "last.ckpt", resume=True) is None


def test_under_slurm_a_stopped_job_is_saved_requeued_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    slurm = {"NTASKS": "1", "JOB_NAME": "train", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in {**slurm, "NTASKS_PER_NODE": "1", "NODELIST": "localhost"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "scontrol").write_text(f"#!/bin/sh\necho $@ > {tmp_path}/asked\n")
    (bin_ / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    monkeypatch.setattr(Sends, "number", signal.SIGUSR1)
    root = f"--trainer.default_root_dir={tmp_path}"
    assert exit_code_of_stopped_run(tmp_path, "update", root) == 143
    assert (tmp_path / "asked").read_text().split() == ["requeue", "7"]
    assert "after 3 optimizer steps, and asked SLURM to requeue the job" in capfd.readouterr().err
    assert problem(tmp_path / "hpc_ckpt_1.ckpt", resume=True) is None
    assert cli_exit_code("fit", tmp_path, *FLAGS, root, "--trainer.max_epochs=2") == 0  # SLURM repeats the same command
    assert [step for step, _ in scalars(tmp_path, 1)["train/loss"]] == [3]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--checkpoint.every_n_train_steps=1", "checkpoint.every_n_train_steps saves where a run cannot be resumed"),
        ("--checkpoint.dirpath=/dev/null/here", "checkpoints cannot be written to /dev/null/here: Not a directory"),
        ("--trainer.logger.save_dir=/dev/null/here", "cannot be written"),
    ],
)
def test_checkpoint_settings_that_would_fail_later_are_refused_at_the_start(
    flag: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli_exit_code("fit", tmp_path, "--trainer.max_epochs=1", flag) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line


# -- checkpoints ---------------------------------------------------------------------------------------------------


def write_checkpoint(path: Path, size: int = 1000, **parts: Any) -> Path:
    """Writes a file that has all parts of a checkpoint."""
    whole = {
        "pytorch-lightning_version": "2.6",
        "loops": {},
        "lr_schedulers": [],
        "state_dict": {"w": torch.ones(size)},
    }
    WholeCheckpointIO().save_checkpoint({**whole, **parts}, path)
    return path


class RunsCode:
    """Runs a shell command when unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch it-ran",)


def test_resume_takes_the_newest_complete_checkpoint_and_names_the_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    good = write_checkpoint(tmp_path / "a" / "epoch-0.ckpt")
    truncated = tmp_path / "a" / "last.ckpt"
    truncated.write_bytes(good.read_bytes()[:-100])
    other = tmp_path / "b" / "epoch-1.ckpt"
    other.parent.mkdir()
    torch.save({"weights": torch.ones(3)}, other)
    code = tmp_path / "b" / "epoch-2.ckpt"
    torch.save({**torch.load(good), "callbacks": RunsCode()}, code)
    pickled = tmp_path / "b" / "epoch-3.ckpt"
    pickled.write_bytes(pickle.dumps(RunsCode()))
    shards = tmp_path / "b" / "epoch-4.ckpt"
    shards.mkdir()
    index = tmp_path / "b" / "epoch-5.ckpt"
    index.mkdir()
    (index / ".metadata").write_bytes(pickle.dumps(RunsCode()))
    (index / "meta.pt").write_bytes(good.read_bytes())
    os.utime(index / "meta.pt", (6, 6))
    for i, path in enumerate((good, truncated, other, code, pickled, shards)):
        os.utime(path, (i, i))
    assert newest([tmp_path], [], resume=True) == good
    assert [record.getMessage().split("; using")[0].split(", which ")[1] for record in caplog.records] == [
        "holds pickled objects that could run code when loaded",
        "is not a complete folder of shards",
        "is truncated or not a checkpoint",
        "holds pickled objects that could run code when loaded",
        "is not a Lightning checkpoint",
        "is truncated or not a checkpoint",
    ]
    assert not (tmp_path / "it-ran").exists()
    good.unlink()
    with pytest.raises(ConfigError, match=r"no checkpoint can be used; the newest is .*epoch-5.ckpt, which"):
        newest([tmp_path], [], resume=True)
    assert newest([tmp_path / "c"], [], resume=True) is None


def test_loading_shards_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch loads the parts of shards that are no tensors with `torch.load(..., weights_only=False)`."""
    monkeypatch.chdir(tmp_path)
    file = io.BytesIO()
    torch.save(RunsCode(), file)
    file.seek(0)
    with no_code(), pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=False)
    assert WEIGHTS_ONLY_VARIABLE not in os.environ
    assert not list(tmp_path.iterdir())


def test_a_weights_only_file_can_be_evaluated_but_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    torch.save({"pytorch-lightning_version": "2.6", "loops": {}, "state_dict": {}}, path)
    assert problem(path, resume=False) is None
    assert "only weights" in str(problem(path, resume=True))


@pytest.mark.parametrize("limit", [0, 10_000, 200_000])
def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path: Path, limit: int) -> None:
    """The system's limit on file sizes stands in for a full disk."""
    path = write_checkpoint(tmp_path / "last.ckpt", 10)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            ConfigError, match=r"last.ckpt cannot be written: File too large; .* resume with --ckpt_path"
        ):
            write_checkpoint(path, 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = write_checkpoint(tmp_path / "other.ckpt", state_dict={"policy.model.lm_head.weight": torch.ones(2, 2)})
    assert cli_exit_code("fit", tmp_path, f"--ckpt_path={other}") == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "the checkpoint is of a different model" in line


def test_resuming_with_max_steps_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_checkpoint(tmp_path / "last.ckpt")
    assert cli_exit_code("fit", tmp_path, f"--ckpt_path={path}", "--trainer.max_steps=8") == 2
    assert "trainer.max_steps: only runs whose end is given in epochs" in capfd.readouterr().err


@pytest.mark.parametrize(("kills", "args"), [(1, ONE_KILL), pytest.param(14, [], marks=pytest.mark.slow)])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_run(kills: int, args: list[str], tmp_path: Path) -> None:
    """A short version of benchmarks/kill.py: one kill in an update, or two in each phase."""
    args = [f"--kills={kills}", *args, f"--out={tmp_path}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "kill.py"), *args],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert f"{kills} kills: the same bit for bit" in done.stdout
