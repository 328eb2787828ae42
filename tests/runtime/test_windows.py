"""No run needs what Windows lacks: POSIX signals, process groups, opening folders, modules that only POSIX has.

In place of Windows, the test removes these from a process after it has imported the libraries, which adapt to the
system themselves.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

SCRIPT = """
import multiprocessing, os, signal, sys

KEPT = {"SIGINT", "SIGTERM", "SIGABRT", "SIGFPE", "SIGILL", "SIGSEGV", "SIG_DFL", "SIG_IGN", "SIG_BLOCK", "SIG_SETMASK"}


def remove_posix_features():
    import lightning.pytorch.cli, math_verify, torch._dynamo, torch.distributed.checkpoint, torch.utils.tensorboard
    import rich.console, transformers.models.qwen3.modeling_qwen3
    from lightning.pytorch.trainer.connectors import signal_connector

    signal_connector._IS_WINDOWS = True
    for name in ("resource", "fcntl", "pwd", "grp", "termios"):
        sys.modules[name] = None
    for name in ("fork", "killpg", "setsid", "getpgid", "getuid", "geteuid", "sched_getaffinity", "uname"):
        if hasattr(os, name):
            delattr(os, name)
    for name in [name for name in dir(signal) if name.startswith("SIG") and name not in KEPT]:
        delattr(signal, name)
    signal.valid_signals = lambda: {signal.SIGINT, signal.SIGTERM, signal.SIGABRT}
    multiprocessing.get_all_start_methods = lambda: ["spawn"]
    original_open = os.open

    def open_(path, *args, **kwargs):
        if not isinstance(path, int) and os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return original_open(path, *args, **kwargs)

    os.open = open_


if __name__ == "__main__":
    remove_posix_features()
    from rlrt_lightning.__main__ import main

    resumed = ["fit", "--trainer.max_epochs=2", "--ckpt_path=last"]
    for command in (["fit", "--trainer.max_epochs=1"], resumed, ["validate", "--ckpt_path=last"]):
        assert main([command[0], *sys.argv[1:], *command[1:]]) == 0, command
"""


@pytest.mark.slow
def test_training_resuming_and_evaluating_work_without_posix_features(tmp_path: Path) -> None:
    (tmp_path / "without.py").write_text(SCRIPT)
    flags = ["--data.benchmarks.heldout.limit=4", "--data.benchmarks.longer.limit=2", "--data.prompts_per_epoch=4"]
    flags += [f"--config={ROOT / 'configs' / 'rlrt.yaml'}", f"--trainer.logger.save_dir={tmp_path}"]
    args = [sys.executable, str(tmp_path / "without.py"), *flags, "--trainer.enable_progress_bar=false"]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "last-digit" / "rlrt-0" / "checkpoints" / "last.ckpt").exists()
    assert list(tmp_path.glob("last-digit/rlrt-0/evaluation/step-4/heldout.parquet"))
