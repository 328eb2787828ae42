"""Helpers for tests that start other processes."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_cli(*args: str, timeout: float = 300) -> None:
    """Runs the command line in a new process, and requires success: pytest's own process cannot start several ranks."""
    done = subprocess.run(
        [sys.executable, "-m", "rlrt_lightning", *args],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def unused_port() -> int:
    """A free port below the ephemeral range, so that no other program is assigned it by chance."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port
