"""Runs `tests.helpers.on_ranks` in forks of one process, because importing takes longer than most of its runs.

The process that forks is not pytest's, which has threads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers.processes import ROOT


class Fork(NamedTuple):
    """A process and the file with its stderr."""

    pid: int
    stderr: Path


class Forks:
    """Starts processes as forks of a server process, which is started on first use."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def start(self, args: Sequence[str], env: dict[str, str]) -> Fork:
        """Starts `tests.helpers.on_ranks`.

        Args:
            args: Its arguments.
            env: Environment variables to add to this process's.
        """
        with tempfile.NamedTemporaryFile(prefix="stderr-", dir=Path.cwd(), delete=False) as stderr:
            return Fork(self._ask(args=args, env=env, stderr=stderr.name), Path(stderr.name))

    def wait(self, fork: Fork, timeout_s: float = 200) -> int:
        """Waits for a process and returns its exit code; it is killed when the time is over."""
        return self._ask(pid=fork.pid, timeout_s=timeout_s)

    def close(self) -> None:
        """Ends the server."""
        if self._server is not None:
            self._server.communicate()
        self._server = None

    def _ask(self, **request: Any) -> int:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.forks"],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())


def _start(args: list[str], env: dict[str, str], stderr: str) -> int:
    """Forks, and returns the id of the new process, which never returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        from tests.helpers import on_ranks

        null = os.open(os.devnull, os.O_RDWR)
        for fd, target in enumerate((null, null, os.open(stderr, os.O_WRONLY))):
            os.dup2(target, fd)
        os.environ.update(env)
        on_ranks.main(args)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, timeout_s: float) -> int:
    end = time.monotonic() + timeout_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def main() -> None:
    import tests.helpers.on_ranks  # noqa: F401 - imported once for all forks

    for line in sys.stdin:
        request = json.loads(line)
        print(_wait(**request) if "pid" in request else _start(**request), flush=True)


if __name__ == "__main__":
    main()
