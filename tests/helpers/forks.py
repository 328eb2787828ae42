"""Runs `tests.helpers.on_ranks` in forks of one process, because importing takes longer than most of its runs."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.processes import ROOT

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.helpers.on_ranks"])


class Fork(NamedTuple):
    """A process and the file with its stderr."""

    process: BaseProcess
    stderr: Path

    def wait(self, timeout_s: float = 200) -> int:
        """Waits for the process and returns its exit code; it is killed when the time is over."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode


def fork(folder: Path, args: Sequence[str], env: dict[str, str]) -> Fork:
    """Starts `tests.helpers.on_ranks`.

    Args:
        folder: The folder for its stderr.
        args: Its arguments.
        env: Environment variables to add to those of the fork server.
    """
    with pytest.MonkeyPatch.context() as server:
        server.setenv("PYTHONPATH", str(ROOT))  # the server of older Pythons does not search this process's path
        server.setenv("CUDA_VISIBLE_DEVICES", "")
        forkserver.ensure_running()
    stderr = folder / f"stderr-{os.urandom(4).hex()}"
    process = FORKS.Process(target=_run, args=(list(args), env, str(stderr)))
    process.start()
    return Fork(process, stderr)


def _run(args: list[str], env: dict[str, str], stderr: str) -> None:
    from tests.helpers import on_ranks

    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    os.environ.update(env)
    on_ranks.main(args)
