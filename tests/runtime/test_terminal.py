"""What a run prints: to a terminal, to a file, on Ctrl-C, and while it waits."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from rlrt_lightning import ConfigError
from rlrt_lightning.callbacks import PhaseBar, adopt_progress_bar
from rlrt_lightning.runtime import hub, terminal
from tests.helpers.command_line import cli_exit_code, runs_in
from tests.helpers.processes import unused_port
from tests.runtime.test_stopping import Sends, exit_code_of_stopped_run

SHARE, SCORE = r"\d\.\d\d", r"\d\.\d{3}"
EPOCH = re.compile(
    rf"epoch \d/2  reward {SHARE}  correct {SHARE}  length [\d.]+  entropy {SHARE}  mixed {SHARE}  [\d.]+ s"
)
ROW = re.compile(rf"  (heldout|longer) +avg@8 {SCORE} \[{SCORE}, {SCORE}\]  pass@8 {SCORE}")

FLAGS = ("--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=2", "--trainer.enable_progress_bar=true")


@contextmanager
def pseudo_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Connects stdout to a pseudo-terminal of unknown size; the list gets the output at the end."""
    outer, inner = os.openpty()
    chunks: list[bytes] = []
    output: list[str] = []

    def read() -> None:
        try:
            while chunk := os.read(outer, 65536):
                chunks.append(chunk)
        except OSError:  # the other end is closed
            return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(inner, "w", buffering=1) as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        patch.setenv("TERM", "xterm")
        yield output
    reader.join(10)
    os.close(outer)
    output.append(b"".join(chunks).decode())


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run, and what it prints to a file."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch, (folder / "log").open("w+") as file:
        patch.setattr(sys, "stdout", file)
        assert cli_exit_code("fit", folder, *FLAGS) == 0
    return folder, (folder / "log").read_text()


def test_a_log_file_has_a_line_for_each_epoch_and_evaluation_set_and_no_control_characters(
    log: tuple[Path, str],
) -> None:
    folder, text = log
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    lines = text.splitlines()
    (run,) = runs_in(folder)
    assert lines[0] == f"run folder: {run}"
    assert lines[1] == "before training"
    assert [bool(EPOCH.fullmatch(line)) for line in lines[2:8]] == [False, False, True, True, False, False]
    assert [bool(ROW.fullmatch(line)) for line in lines[2:8]] == [True, True, False, False, True, True]
    assert len(lines) <= 20


def test_a_run_ends_with_what_has_changed_and_the_next_commands(log: tuple[Path, str]) -> None:
    folder, text = log
    (run,) = runs_in(folder)
    end = text[text.index("from the first evaluation to the last") :]
    first, last = (re.findall(rf"heldout +avg@8 ([\d.]+) {mark}", text) for mark in (r"\[", "->"))
    assert re.search(rf"heldout +avg@8 {first[0]} -> {first[-1]}  pass@8", end)
    assert last == first[:1]
    assert f"run folder  {run}\ncheckpoint  {run / 'checkpoints' / 'last.ckpt'}\n" in end
    assert f"next        tensorboard --logdir {folder}\n" in end
    assert f"python -m rlrt_lightning validate --config {run / 'config.yaml'} --ckpt_path last" in end


def test_a_terminal_also_shows_the_phases_in_a_line_that_is_redrawn(
    log: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pseudo_terminal(monkeypatch) as output:
        assert cli_exit_code("fit", tmp_path, *FLAGS) == 0
    drawn = [part for line in output[0].split("\r\n") for part in line.split("\r")]
    for phase in ("rollouts", "verdicts", "scoring", "updates"):
        assert any(part.startswith(f"epoch 1/2  {phase}") for part in drawn), phase
    assert any(re.match(r"before training  heldout, problems 1 to 6 of 6 .* 0/48", part) for part in drawn)
    assert any(re.search(r"updates .* 2/2,  \d+ tokens  [\d,]+ tokens/s", part) for part in drawn)
    kept = [line.split("\r")[-1] for line in output[0].split("\r\n")]

    def without_folder_and_times(lines: list[str], folder: Path) -> list[str]:
        return [re.sub(r"[\d.]+ s$", "", line.replace(str(folder), "")) for line in lines]

    folder, text = log
    expected = without_folder_and_times(text.splitlines(), folder)
    assert [line for line in without_folder_and_times(kept, tmp_path) if line] == [line for line in expected if line]


def test_a_bar_is_shown_only_if_the_user_wants_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pseudo_terminal(monkeypatch) as output:
        assert cli_exit_code("fit", tmp_path, *FLAGS[:2], "--trainer.enable_progress_bar=false") == 0
    assert "rollouts" not in output[0]
    for theirs, kept in ((RichProgressBar(refresh_rate=5), True), (TQDMProgressBar(leave=True), True), (None, False)):
        made = Trainer(logger=False, callbacks=[theirs] if theirs else [], enable_checkpointing=False)
        adopt_progress_bar(made)
        assert isinstance(made.progress_bar_callback, PhaseBar) is not kept
    made = Trainer(logger=False, enable_progress_bar=False)
    adopt_progress_bar(made)
    assert made.progress_bar_callback is None


@pytest.mark.parametrize("name", ["validate", "predict"])
def test_an_evaluation_prints_one_table_and_its_folder(
    name: str, log: tuple[Path, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (run,) = runs_in(log[0])
    assert cli_exit_code(name, tmp_path, f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}") == 0
    *rows, files = capfd.readouterr().out.splitlines()
    assert [bool(ROW.fullmatch(row)) for row in rows] == [True, True]
    assert (Path(files.removeprefix("files: ")) / "heldout.jsonl").exists()


# -- Ctrl-C --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["rollout", "update"])
def test_ctrl_c_saves_the_run_and_says_how_to_resume(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Sends, "number", signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore the signal
    try:
        assert exit_code_of_stopped_run(tmp_path, phase) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    steps = {"rollout": 2, "update": 3}[phase]
    error = capfd.readouterr().err
    assert f"stopped by SIGINT: saved after {steps} optimizer steps as " in error
    assert "resume with --ckpt_path last" in error


# -- waiting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [False, True], ids=["closed port", "no answer"])
def test_a_hub_that_cannot_be_reached_is_refused_in_one_line(
    answers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(terminal, "PATIENCE_S", 0.3 if answers else 60)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1] if answers else unused_port()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        assert cli_exit_code("fit", tmp_path, "--model.policy.path=owner/no-such-model", "--trainer.max_epochs=1") == 2
    lines = capfd.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("error:")]
    assert f"'owner/no-such-model' is not a local path, and the model cannot be looked up at 127.0.0.1:{port}" in line
    assert "set it to a local path" in line
    assert (f"waiting for 127.0.0.1:{port}, to find the model owner/no-such-model" in lines) is answers
    assert not list(tmp_path.iterdir())


def test_a_dataset_on_a_hub_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from rlrt_lightning import DatasetTask

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused_port()}")
    with pytest.raises(
        ConfigError, match="train: 'owner/sums' is not a local path, and the dataset cannot be looked up"
    ):
        DatasetTask(train="owner/sums:main:train").problems("train")


def test_a_cached_model_is_used_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused_port()}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    hub.check_reachable("model.policy.path", "owner/cached", "model")
    assert constants.HF_HUB_OFFLINE, "no further request waits for the hub"


def test_only_a_long_wait_is_announced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(terminal, "PATIENCE_S", 0.2)
    with terminal.waiting_for("nothing"):
        pass
    with terminal.waiting_for("the server"):
        time.sleep(0.5)
    assert capsys.readouterr().err == "waiting for the server\n"
