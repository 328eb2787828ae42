"""Client of one vLLM server, which keeps the server's weights up to date."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrt_lightning.rollouts.vllm_common import AdapterRefused, EngineError
from rlrt_lightning.runtime.terminal import PATIENCE_S, say

if TYPE_CHECKING:
    import httpx

MAX_RETRY_DELAY_S = 10.0  # between two attempts to reach a server
MAX_UNKNOWN = 3  # times that a server may not know the adapters that a request names

ADAPTER = "rlrt-"
"""Prefix of the names of our adapters on a server."""


@dataclass(frozen=True)
class Target:
    """The weights that a server should have.

    Args:
        weights: Folder of the model's weights; without the adapters if these are sent separately.
        adapters: Folder of the adapters; None if they are not sent separately.
    """

    weights: Path
    adapters: Path | None = None

    @property
    def version(self) -> str:
        """The version that the server reports."""
        return self.weights.name if self.adapters is None else f"{self.weights.name}+{self.adapters.name}"

    @property
    def model(self) -> dict[str, str]:
        """The field of a request that names the adapters. Each version has a new name, which is part of the keys of
        vLLM's prefix cache."""
        return {} if self.adapters is None else {"model": ADAPTER + self.adapters.name}


class EngineUnavailable(Exception):
    """A server has not responded for `patience_s`."""


class Server:
    """Client of one server, which keeps the server's weights up to date."""

    def __init__(self, url: str, timeout_s: float, patience_s: float, concurrency: int) -> None:
        import httpx

        self.url, self.patience_s = url, patience_s
        limits = httpx.Limits(max_connections=concurrency + 4)
        key = os.environ.get("VLLM_API_KEY")
        # No proxy from the environment: the servers are on the local network.
        self.client: httpx.Client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=10.0),
            limits=limits,
            trust_env=False,
        )
        self.target: Target | None = None
        self._loads = 0
        self._is_down = False
        self._lock = threading.Lock()

    def complete(self, body: dict[str, Any], stop: threading.Event) -> dict[str, Any]:
        """The answer to a request, computed with the target weights.

        Raises:
            EngineUnavailable: If the server does not respond.
            EngineError: If it rejects the request.
        """
        assert self.target is not None
        unknown = 0
        while not stop.is_set():
            try:
                loads = self._loads
                answer = self._call("POST", "/v1/completions", {**body, **self.target.model})
                # If the target weights were loaded meanwhile, outdated weights may have sampled the first tokens.
                if self._is_up_to_date() and loads == self._loads and not _is_aborted(answer):
                    return answer
            except UnknownAdapters:  # after a restart
                unknown += 1
                if unknown > MAX_UNKNOWN:
                    raise
            except _Unreachable:
                pass
            self.update(stop)
        raise EngineUnavailable(f"{self.url}: stopped")

    def try_update(self) -> EngineUnavailable | None:
        """Calls `update`; returns the error instead of raising it."""
        try:
            self.update()
        except EngineUnavailable as error:
            return error
        return None

    def update(self, stop: threading.Event | None = None) -> None:
        """Waits until the server responds, and loads the target weights if it has others.

        Raises:
            EngineUnavailable: If it does not respond in time.
        """
        with self._lock:  # only one of the server's workers updates it
            since, pause, why, announced = time.monotonic(), 0.1, "", False
            while stop is None or not stop.is_set():
                try:
                    if not self._is_up_to_date():
                        self._load()
                    self._is_down = False
                    return
                except _Unreachable as error:
                    why = str(error)
                if self._is_down or time.monotonic() - since > self.patience_s:
                    self._is_down = True  # from now on, only one attempt per sync
                    raise EngineUnavailable(
                        f"data.engine.urls: {self.url} has not answered for {self.patience_s:g} s ({why}); start the "
                        "server (python -m rlrt_lightning serve) and resume with --ckpt_path last"
                    )
                if not announced and time.monotonic() - since > PATIENCE_S:
                    announced = True
                    say(f"waiting for {self.url}, for at most {self.patience_s:g} s ({why})", file=sys.stderr)
                time.sleep(pause)
                pause = min(2 * pause, MAX_RETRY_DELAY_S, self.patience_s)

    def _version(self) -> str:
        return str(self._call("GET", "/weight_info").get("weight_version", ""))

    def _is_up_to_date(self) -> bool:
        assert self.target is not None
        return self._version() == self.target.version

    def _load(self) -> None:
        assert self.target is not None
        self._loads += 1
        if self.target.adapters is not None:
            # For requests that are still running, such as those of an abandoned call, vLLM would load the adapters that
            # they name again, from a folder that may not exist any more.
            self._call("POST", "/abort_requests", {})
        if self._version().partition("+")[0] != self.target.weights.name:
            kwargs = {"weights_path": str(self.target.weights)}
            self._call("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": kwargs})
        if self.target.adapters is not None:
            self._load_adapters(self.target.model["model"], self.target.adapters)
        # While requests are running, vLLM would otherwise keep its cache.
        self._call("POST", "/reset_prefix_cache?reset_running_requests=true")
        self._call("POST", "/update_weight_version", {"new_version": self.target.version})

    def _load_adapters(self, name: str, folder: Path) -> None:
        """Loads adapters unless the server has them, and removes earlier ones.

        Raises:
            AdapterRefused: If the server cannot load them.
        """
        known = self._adapters()
        if name not in known:
            try:
                self._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
            except EngineError as error:
                if name not in self._adapters():  # another rank may have loaded them meanwhile
                    raise AdapterRefused(f"{error}; start the server with python -m rlrt_lightning serve") from error
        for earlier in known - {name}:
            with suppress(EngineError):  # another rank may have removed it
                self._call("POST", "/v1/unload_lora_adapter", {"lora_name": earlier})

    def _adapters(self) -> set[str]:
        """The names of our adapters on the server."""
        names = {str(model["id"]) for model in self._call("GET", "/v1/models")["data"]}
        return {name for name in names if name.startswith(ADAPTER)}

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        import httpx

        try:
            answer = self.client.request(method, path, json=body)
        except httpx.TransportError as error:
            raise _Unreachable(f"{type(error).__name__}: {error}") from None
        if answer.status_code in (502, 503, 504):  # still starting, possibly behind a proxy
            raise _Unreachable(f"{path} returned {answer.status_code}")
        if answer.status_code == 401:
            raise EngineError(
                f"data.engine.urls: {self.url} requires an API key: set the environment variable VLLM_API_KEY"
            )
        if answer.status_code == 404 and path == "/v1/completions":
            raise UnknownAdapters(f"data.engine.urls: {self.url}{path} returned 404: {answer.text[:500]}")
        if answer.status_code == 404 and not path.startswith("/v1/"):
            raise EngineError(
                f"data.engine.urls: {self.url} has no endpoint {path}; start it with python -m rlrt_lightning serve, "
                "or set VLLM_SERVER_DEV_MODE=1 in its environment"
            )
        if answer.status_code >= 400:
            raise EngineError(f"data.engine.urls: {self.url}{path} returned {answer.status_code}: {answer.text[:500]}")
        try:
            return answer.json()
        except json.JSONDecodeError:
            return {}


class UnknownAdapters(EngineError):
    """The server does not have the adapters that the request names."""


def _is_aborted(answer: dict[str, Any]) -> bool:
    return any(choice.get("finish_reason") == "abort" for choice in answer.get("choices", []))


class _Unreachable(Exception):
    """One request to the server failed; it can be retried."""
