"""A vLLM server in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from tests.helpers.processes import ROOT, unused_port

ENGINE_SECONDS = 240  # until a started server answers


class VllmServer:
    """`python -m rlrt_lightning serve` on loopback.

    Args:
        flags: Additional flags of the command.
    """

    def __init__(self, *flags: str) -> None:
        self.port = unused_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.flags = flags
        self.start()

    def start(self) -> None:
        args = [f"--config={ROOT / 'configs' / name}.yaml" for name in ("rlrt", "rollouts/vllm_server")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlrt_lightning", "serve", *args, f"--port={self.port}", *self.flags],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def wait(self) -> None:
        import httpx

        end = time.monotonic() + ENGINE_SECONDS
        while time.monotonic() < end:
            try:
                if httpx.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert self.process.poll() is None, "the server ended"
            time.sleep(0.5)
        raise AssertionError("the server does not answer")
