"""What tests do with processes of their own."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_cli(*words: str, timeout: float = 300) -> None:
    """The command line in a process of its own, which has to succeed: several ranks cannot start within pytest's."""
    done = subprocess.run(
        [sys.executable, "-m", "rlrt_lightning", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def unused_port() -> int:
    """A port that nobody listens on, from below the range that systems hand out, so that nobody gets it by chance."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port
