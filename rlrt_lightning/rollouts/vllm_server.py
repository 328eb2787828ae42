"""Rollouts from one or more vLLM servers, local or remote."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlrt_lightning.rollouts.base import Rollout, Sampling, Stops, room
from rlrt_lightning.rollouts.vllm_common import EngineError, VllmEngine, as_rollout, head_overrides, request
from rlrt_lightning.runtime.credentials import refuse_credentials
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.files import written_aside
from rlrt_lightning.runtime.precision import Dtype
from rlrt_lightning.runtime.ranks import of_first_rank
from rlrt_lightning.runtime.terminal import PATIENCE_S, say

if TYPE_CHECKING:
    import httpx

    from rlrt_lightning.policy.model import Policy

log = logging.getLogger(__name__)

SHARD_BYTES = 4 * 2**30
MAX_RETRY_DELAY_S = 10.0  # between two attempts to reach a server


class VllmServerEngine(VllmEngine):
    """Samples on vLLM servers (`python -m rlrt_lightning serve` starts one with the right flags).

    New weights are sent through a folder that the trainer and the servers share. Each server reports the version of
    its weights; responses from outdated weights, as after a server's restart, are dropped and requested again. With
    top-p, top-k or min-p the log-probs are those of the truncated distribution.

    The weight endpoints belong to vLLM's development mode, and anyone who can reach them can change the model: use
    loopback or a trusted network only. The environment variable VLLM_API_KEY is sent to servers that require an API
    key; the key does not protect the weight endpoints.

    Args:
        urls: Addresses of the servers, such as http://127.0.0.1:8000.
        weights: Folder for the weights, at the same path for the trainer and the servers.
        dtype: Type of the weights that are sent, and of the servers' weights; null follows `trainer.precision`:
            bfloat16 for bf16-*, float16 for 16-*, and otherwise the policy's.
        concurrency: Maximum number of concurrent requests to each server.
        timeout_s: Timeout of one request, in seconds.
        patience_s: How long to wait for an unresponsive server, in seconds, before the remaining servers take over its
            requests; the run stops when none is left.
        tolerance: Largest mean |difference|, in nats, between vLLM's log-probs and the policy's in float32 after a
            sync; null means 1e-4 in float32, and in half precision four times the policy's own rounding on the same
            tokens.
        check_rollouts: Number of rollouts whose log-probs are compared after each sync.
    """

    beside_training = True

    def __init__(
        self,
        urls: list[str],
        weights: str = "runs/weights",
        dtype: Dtype | None = None,
        concurrency: int = 64,
        timeout_s: float = 1800.0,
        patience_s: float = 600.0,
        tolerance: float | None = None,
        check_rollouts: int = 4,
    ) -> None:
        super().__init__(dtype, tolerance, check_rollouts)
        refuse_credentials(urls, "data.engine.urls")
        if not urls or not all(url.startswith(("http://", "https://")) for url in urls):
            raise ConfigError(f"data.engine.urls is {urls}; it has to name servers, such as http://127.0.0.1:8000")
        for name, value in (("concurrency", concurrency), ("timeout_s", timeout_s), ("patience_s", patience_s)):
            if value <= 0:
                raise ConfigError(f"data.engine.{name} is {value}; it has to be above 0")
        self.urls = [url.rstrip("/") for url in urls]
        self.weights = weights
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self.patience_s = patience_s
        self._servers: list[_Server] = []
        self._version = 0

    @property
    def ready(self) -> bool:
        """See `RolloutEngine.ready`."""
        return self._version > 0

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        for server in self._servers:
            server.client.close()
        self._servers, self._version = [], 0

    def _send_weights(self, policy: Policy) -> None:
        if not self._servers:
            self._servers = [_Server(url, self.timeout_s, self.patience_s, self.concurrency) for url in self.urls]
        # Versions are timestamps, since servers may outlive this run and still have an earlier run's weights.
        self._version = of_first_rank(max(self._version + 1, time.time_ns()))
        folder = Path(self.weights).resolve() / str(self._version)
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        write_weights(self._weights(policy), folder, write=first)
        for server in self._servers:
            server.target = str(self._version), folder
        if first:
            self._update_servers()
        of_first_rank(self._version)  # the other ranks wait until the servers have the weights
        if not first:
            return
        for old in folder.parent.iterdir():  # a restarted server loads the newest weights
            if old.name.isdigit() and int(old.name) < self._version:
                shutil.rmtree(old, ignore_errors=True)

    def _update_servers(self) -> None:
        """Loads the target weights into all servers concurrently.

        Raises:
            EngineError: If no server responds, or one rejects the weights.
        """
        with ThreadPoolExecutor(len(self._servers)) as pool:
            failed = [error for error in pool.map(_Server.try_update, self._servers) if error is not None]
        if len(failed) == len(self._servers):
            raise EngineError(str(failed[0]))
        for error in failed:
            log.warning("%s; continuing with the other servers", error)

    def _sample(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[Rollout]:
        policy = self._policy
        assert policy is not None
        stops = Stops.of(policy, sampling)
        jobs = [(group, index) for group in range(len(prompts)) for index in range(n)]
        bodies = [
            {
                "prompt": prompts[group],
                "return_token_ids": True,
                **request(sampling, stops, room(policy, prompts[group], sampling), seeds[group], index),
            }
            for group, index in jobs
        ]
        for i, answer in self._request_all(bodies):
            choice, (group, index) = answer["choices"][0], jobs[i]
            logp = choice["logprobs"]["token_logprobs"]
            yield as_rollout(group, index, prompts[group], choice["token_ids"], logp, choice["finish_reason"], policy)

    def score(self, sequences: Sequence[tuple[list[int], list[int]]], temperature: float = 1.0) -> list[Tensor]:
        """Log-probs of given responses, as returned by `Policy.score`. A server does not use its prefix cache for
        requests with prompt log-probs, so it processes each prompt and response from the beginning.

        Raises:
            ConfigError: If the temperature is not 1; vLLM computes log-probs of prompts at temperature 1 only.
        """
        if temperature != 1:
            raise ConfigError(
                f"data.sampling.temperature is {temperature}; vLLM scores given tokens at temperature 1 only: set it "
                "to 1, or set model.teacher.scored_by to trainer"
            )
        nonempty = [i for i, (_, response) in enumerate(sequences) if response]
        prompts = [sequences[i][0] + sequences[i][1] for i in nonempty]
        bodies = [{"prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0} for prompt in prompts]
        scores: list[Tensor] = [torch.empty(0)] * len(sequences)
        for job, answer in self._request_all(bodies):
            i = nonempty[job]
            response = sequences[i][1]
            steps = answer["choices"][0]["prompt_logprobs"][-len(response) :]
            scores[i] = torch.tensor([s[str(t)]["logprob"] for s, t in zip(steps, response, strict=True)])
        return scores

    def _request_all(self, bodies: Sequence[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the servers' answers as they arrive, with the index of the request. Each server takes the next
        request when it has capacity.

        Raises:
            EngineError: If no server responds any more, or one rejects a request.
        """
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(len(bodies)):
            waiting.put(i)
        answered: queue.SimpleQueue[tuple[int, dict[str, Any]] | Exception] = queue.SimpleQueue()
        stop = threading.Event()

        def work(server: _Server) -> None:
            while not stop.is_set():
                try:
                    i = waiting.get(timeout=0.05)
                except queue.Empty:
                    continue
                try:
                    answered.put((i, server.complete(bodies[i], stop)))
                except EngineUnavailable as error:
                    waiting.put(i)  # for another server
                    answered.put(error)
                    return
                except Exception as error:
                    answered.put(error)
                    return

        workers = [(server, number) for server in self._servers for number in range(self.concurrency)]
        for server, number in workers[: max(len(bodies), len(self._servers))]:
            threading.Thread(target=work, args=(server,), name=f"{server.url}-{number}", daemon=True).start()
        active = min(len(workers), max(len(bodies), len(self._servers)))
        try:
            missing = len(bodies)
            while missing:
                answer = answered.get()
                if isinstance(answer, EngineUnavailable):
                    active -= 1
                    if active == 0:
                        raise EngineError(str(answer))
                elif isinstance(answer, Exception):
                    raise answer
                else:
                    missing -= 1
                    yield answer
        finally:
            stop.set()


class EngineUnavailable(Exception):
    """A server has not responded for `patience_s`."""


class _Server:
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
        self.target: tuple[str, Path] | None = None  # version and folder of the weights that it should have
        self._loads = 0
        self._is_down = False
        self._lock = threading.Lock()

    def complete(self, body: dict[str, Any], stop: threading.Event) -> dict[str, Any]:
        """The answer to a request, computed with the target weights.

        Raises:
            EngineUnavailable: If the server does not respond.
            EngineError: If it rejects the request.
        """
        while not stop.is_set():
            try:
                loads = self._loads
                answer = self._call("POST", "/v1/completions", body)
                # If the target weights were loaded meanwhile, outdated weights may have sampled the first tokens.
                if self._is_up_to_date() and loads == self._loads:
                    return answer
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

    def _is_up_to_date(self) -> bool:
        assert self.target is not None
        return self._call("GET", "/weight_info").get("weight_version") == self.target[0]

    def _load(self) -> None:
        assert self.target is not None
        version, folder = self.target
        self._loads += 1
        self._call("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        # While requests are running, such as those of an abandoned call, vLLM would otherwise keep its cache.
        self._call("POST", "/reset_prefix_cache?reset_running_requests=true")
        self._call("POST", "/update_weight_version", {"new_version": version})

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
        if answer.status_code == 404 and path != "/v1/completions":
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


class _Unreachable(Exception):
    """One request to the server failed; it can be retried."""


def write_weights(weights: Iterable[tuple[str, Tensor]], folder: Path, write: bool = True) -> None:
    """Writes weights as safetensors shards to a temporary folder, which is then renamed.

    Args:
        weights: The weights by name.
        folder: The target folder, which must not exist.
        write: False on the ranks that only take part in gathering sharded weights.
    """
    from safetensors.torch import save_file

    if not write:
        for _ in weights:
            pass
        return
    with written_aside(folder) as aside:
        aside.mkdir()
        for number, shard in enumerate(_shards(weights)):
            save_file(shard, aside / f"model-{number:05}.safetensors")


def _shards(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The weights on the CPU, a few GiB at a time."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in weights:
        # A copy, since safetensors rejects tensors that share memory, such as a tied head.
        shard[name] = tensor.to("cpu", copy=True).contiguous()
        size += shard[name].numel() * shard[name].element_size()
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def server_command(policy: Policy, engine: VllmServerEngine, host: str, port: int, flags: Sequence[str]) -> list[str]:
    """The command that starts a server for a policy.

    Args:
        policy: The policy.
        engine: The engine that will use the server.
        host: Address to listen on.
        port: Port to listen on.
        flags: Additional flags of vLLM.

    Raises:
        ConfigError: If the flags set something that has its own setting.
    """
    for flag in flags:
        if (name := flag.partition("=")[0]) in ("--host", "--port", "--model"):
            raise ConfigError(f"serve.flags sets {name}; use serve's --host and --port, or model.policy.path, instead")
        if name.replace("_", "-").startswith("--hf-overrides") and head_overrides(policy):  # vLLM uses only the last
            raise ConfigError(
                "serve.flags sets --hf-overrides, which would drop the float32 head: also set "
                "model.policy.head_dtype=null"
            )
    if not _is_loopback(host):
        log.warning(
            "anyone who can reach %s, port %s, can replace the model's weights without a key: use a trusted network "
            "only, or 127.0.0.1 to listen on this machine alone",
            host,
            port,
        )
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", policy.path]
    command += ["--dtype", engine.dtype_for(policy), "--host", host, "--port", str(port)]
    command += ["--logprobs-mode", "processed_logprobs", "--enable-prefix-caching"]
    command += ["--generation-config", "vllm"]  # ignore the model's own limits and penalties
    if overrides := head_overrides(policy):
        command += ["--hf-overrides", json.dumps(overrides)]
    if policy.max_positions is not None:
        command += ["--max-model-len", str(policy.max_positions)]
    if not torch.cuda.is_available():
        command += ["--enforce-eager", "--no-enable-chunked-prefill"]  # see VllmColocateEngine
    return [*command, *flags]


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name
        return False


def server_environment() -> dict[str, str]:
    """The environment of `server_command`. The weight endpoints need vLLM's development mode."""
    return {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, "VLLM_SERVER_DEV_MODE": "1"}
