"""vLLM as one or several servers, on this machine or on others."""

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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlrt_lightning.rollouts.base import Rollout, Sampling, Stops, room
from rlrt_lightning.rollouts.vllm_common import Dtype, EngineError, VllmEngine, as_rollout, request
from rlrt_lightning.runtime.credentials import refuse_credentials
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.files import written_aside
from rlrt_lightning.runtime.ranks import of_first_rank

if TYPE_CHECKING:
    import httpx

    from rlrt_lightning.policy.model import Policy

log = logging.getLogger(__name__)

SHARD_BYTES = 4 * 2**30
LONGEST_WAIT_S = 10.0  # between two attempts to reach a server


class VllmServerEngine(VllmEngine):
    """Samples on vLLM servers (`python -m rlrt_lightning serve` starts one with the right flags).

    New weights go through a folder that trainer and servers see, and each server says which weights it has: what comes
    from a server that was started again, and so has its old weights, is dropped and asked for anew. With top-p, top-k
    or min-p the log-probs are those after the cut.

    The servers' endpoints for weights are vLLM's development mode, and let anybody who reaches them change the model:
    loopback or a trusted network only. Servers that want an API key get the environment variable VLLM_API_KEY; it does
    not guard those endpoints.

    Args:
        urls: Addresses of the servers, such as http://127.0.0.1:8000.
        weights: Folder for the weights, seen by the trainer and the servers under the same path.
        dtype: Type of the weights that are sent, and the servers' own; null is the policy's.
        concurrency: Requests under way at each server.
        timeout_s: Longest wait for the answer to one request, in seconds.
        patience_s: How long a server that does not answer is waited for, in seconds, before the others go on without
            it; the run stops when there are none.
        tolerance: Largest mean |difference|, in nats, between vLLM's log-probs and the policy's own after a sync; null
            is 1e-4 in float32 and 0.05 in half precision.
        check_rollouts: Rollouts whose log-probs are compared after each sync.
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
        # Named by the time, since servers may outlive this run and remember the weights of an earlier one.
        self._version = of_first_rank(max(self._version + 1, time.time_ns()))
        folder = Path(self.weights).resolve() / str(self._version)
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        write_weights(policy, folder, self.dtype, write=first)
        for server in self._servers:
            server.wanted = str(self._version), folder
        if first:
            self._catch_up()
        of_first_rank(self._version)  # the others wait until the servers have the weights
        if not first:
            return
        for old in folder.parent.iterdir():  # a server that is started again asks for the newest
            if old.name.isdigit() and int(old.name) < self._version:
                shutil.rmtree(old, ignore_errors=True)

    def _catch_up(self) -> None:
        """Gives all servers the wanted weights, at the same time.

        Raises:
            EngineError: If not one answers, or one refuses them.
        """
        with ThreadPoolExecutor(len(self._servers)) as pool:
            failed = [error for error in pool.map(_Server.try_to_catch_up, self._servers) if error is not None]
        if len(failed) == len(self._servers):
            raise EngineError(str(failed[0]))
        for error in failed:
            log.warning("%s; going on with the other servers", error)

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
        for i, answer in self._ask(bodies):
            choice, (group, index) = answer["choices"][0], jobs[i]
            logp = choice["logprobs"]["token_logprobs"]
            yield as_rollout(group, index, prompts[group], choice["token_ids"], logp, choice["finish_reason"], policy)

    def score(self, sequences: Sequence[tuple[list[int], list[int]]], temperature: float = 1.0) -> list[Tensor]:
        """Log-probs of given responses after given prompts, as `Policy.score`. A server reads each prompt with its
        response from the beginning: where log-probs of a prompt are asked for, it does not use its prefix cache.

        Raises:
            ConfigError: If the temperature is not 1, at which vLLM gives no log-probs of prompts.
        """
        if temperature != 1:
            raise ConfigError(f"vLLM scores given tokens at temperature 1 only, and data.sampling has {temperature}")
        spoken = [i for i, (_, response) in enumerate(sequences) if response]
        prompts = [sequences[i][0] + sequences[i][1] for i in spoken]
        bodies = [{"prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0} for prompt in prompts]
        scores: list[Tensor] = [torch.empty(0)] * len(sequences)
        for job, answer in self._ask(bodies):
            i = spoken[job]
            response = sequences[i][1]
            steps = answer["choices"][0]["prompt_logprobs"][-len(response) :]
            scores[i] = torch.tensor([s[str(t)]["logprob"] for s, t in zip(steps, response, strict=True)])
        return scores

    def _ask(self, bodies: Sequence[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The servers' answers, as they come: each server takes the next request when it has room.

        Raises:
            EngineError: If no server answers any more, or one refuses a request.
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
                except _GivenUp as error:
                    waiting.put(i)  # another server may answer it
                    answered.put(error)
                    return
                except Exception as error:
                    answered.put(error)
                    return

        workers = [(server, number) for server in self._servers for number in range(self.concurrency)]
        for server, number in workers[: max(len(bodies), len(self._servers))]:
            threading.Thread(target=work, args=(server,), name=f"{server.url}-{number}", daemon=True).start()
        at_work = min(len(workers), max(len(bodies), len(self._servers)))
        try:
            missing = len(bodies)
            while missing:
                answer = answered.get()
                if isinstance(answer, _GivenUp):
                    at_work -= 1
                    if at_work == 0:
                        raise EngineError(str(answer))
                elif isinstance(answer, Exception):
                    raise answer
                else:
                    missing -= 1
                    yield answer
        finally:
            stop.set()


class _GivenUp(Exception):
    """A server has not answered for too long."""


class _Server:
    """One server, and which weights it has."""

    def __init__(self, url: str, timeout_s: float, patience_s: float, concurrency: int) -> None:
        import httpx

        self.url, self.patience_s = url, patience_s
        limits = httpx.Limits(max_connections=concurrency + 4)
        key = os.environ.get("VLLM_API_KEY")
        # No proxy from the environment: the servers are ours, and near.
        self.client: httpx.Client = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=10.0),
            limits=limits,
            trust_env=False,
        )
        self.wanted: tuple[str, Path] | None = None
        self._loads = 0
        self._lost = False
        self._lock = threading.Lock()

    def complete(self, body: dict[str, Any], stop: threading.Event) -> dict[str, Any]:
        """The answer to a request by the wanted weights.

        Raises:
            _GivenUp: If the server does not answer.
            EngineError: If it refuses the request.
        """
        while not stop.is_set():
            try:
                loads = self._loads
                answer = self._call("POST", "/v1/completions", body)
                # By the wanted weights from its first token on: they did not come while it was computed.
                if self._has_wanted() and loads == self._loads:
                    return answer
            except _Unreachable:
                pass
            self.catch_up(stop)
        raise _GivenUp(f"{self.url}: stopped")

    def try_to_catch_up(self) -> _GivenUp | None:
        """`catch_up`, saying whether it failed."""
        try:
            self.catch_up()
        except _GivenUp as error:
            return error
        return None

    def catch_up(self, stop: threading.Event | None = None) -> None:
        """Waits until the server answers, and gives it the wanted weights where it has others.

        Raises:
            _GivenUp: If it does not answer in time.
        """
        with self._lock:  # one of its workers is enough
            since, pause, why = time.monotonic(), 0.1, ""
            while stop is None or not stop.is_set():
                try:
                    if not self._has_wanted():
                        self._load()
                    self._lost = False
                    return
                except _Unreachable as error:
                    why = str(error)
                if self._lost or time.monotonic() - since > self.patience_s:
                    self._lost = True  # waited for once: from now on one attempt at each sync
                    raise _GivenUp(
                        f"data.engine.urls: {self.url} has not answered for {self.patience_s:g} s ({why}); start the "
                        "server (python -m rlrt_lightning serve) and resume with --ckpt_path last"
                    )
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_WAIT_S, self.patience_s)

    def _has_wanted(self) -> bool:
        assert self.wanted is not None
        return self._call("GET", "/weight_info").get("weight_version") == self.wanted[0]

    def _load(self) -> None:
        assert self.wanted is not None
        version, folder = self.wanted
        self._loads += 1
        self._call("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        # With requests under way, such as those of a round that was given up, vLLM would keep its cache.
        self._call("POST", "/reset_prefix_cache?reset_running_requests=true")
        self._call("POST", "/update_weight_version", {"new_version": version})

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        import httpx

        try:
            answer = self.client.request(method, path, json=body)
        except httpx.TransportError as error:
            raise _Unreachable(f"{type(error).__name__}: {error}") from None
        if answer.status_code in (502, 503, 504):  # not up yet, or a proxy before it says so
            raise _Unreachable(f"{path} answers {answer.status_code}")
        if answer.status_code == 401:
            raise EngineError(
                f"data.engine.urls: {self.url} wants an API key: set the environment variable VLLM_API_KEY"
            )
        if answer.status_code == 404 and path != "/v1/completions":
            raise EngineError(
                f"data.engine.urls: {self.url} does not know {path}; start it with python -m rlrt_lightning serve, or "
                "set VLLM_SERVER_DEV_MODE=1 for it"
            )
        if answer.status_code >= 400:
            raise EngineError(f"data.engine.urls: {self.url}{path} answers {answer.status_code}: {answer.text[:500]}")
        try:
            return answer.json()
        except json.JSONDecodeError:
            return {}


class _Unreachable(Exception):
    """The server did not answer this time."""


def write_weights(policy: Policy, folder: Path, dtype: Dtype | None = None, write: bool = True) -> None:
    """Writes the policy's weights as safetensors, a few GiB in each file, aside and then renamed.

    Args:
        policy: The policy.
        folder: The folder, which is new.
        dtype: Type of the weights; None is the policy's.
        write: False on the ranks that only take part in the gathering of sharded weights.
    """
    from safetensors.torch import save_file

    if not write:
        for _ in policy.merged_weights():
            pass
        return
    with written_aside(folder) as aside:
        aside.mkdir()
        for number, shard in enumerate(_shards(policy, dtype)):
            save_file(shard, aside / f"model-{number:05}.safetensors")


def _shards(policy: Policy, dtype: Dtype | None) -> Iterator[dict[str, Tensor]]:
    """The policy's weights on the CPU, a few GiB at a time."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in policy.merged_weights():
        # A copy: a head that is tied shares its memory, which safetensors refuses.
        shard[name] = tensor.to("cpu", getattr(torch, dtype) if dtype else tensor.dtype, copy=True).contiguous()
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
        engine: The engine that will ask it.
        host: Where it listens.
        port: Where it listens.
        flags: Further flags of vLLM.

    Raises:
        ConfigError: If the flags set what has a setting of its own.
    """
    for flag in flags:
        if (name := flag.partition("=")[0]) in ("--host", "--port", "--model"):
            raise ConfigError(f"serve.flags sets {name}; set it by serve's own --host and --port, or model.policy.path")
    if not _is_loopback(host):
        log.warning(
            "whoever reaches %s, port %s, can take the model's weights for others, without a key: it has to be in a "
            "trusted network; 127.0.0.1 is for this machine alone",
            host,
            port,
        )
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", policy.path]
    command += ["--dtype", engine.dtype or policy.dtype, "--host", host, "--port", str(port)]
    command += ["--logprobs-mode", "processed_logprobs", "--enable-prefix-caching"]
    command += ["--generation-config", "vllm"]  # no limits and penalties besides those of `Sampling`
    if policy.max_positions is not None:
        command += ["--max-model-len", str(policy.max_positions)]
    if not torch.cuda.is_available():
        command += ["--enforce-eager", "--no-enable-chunked-prefill"]  # as in the training process
    return [*command, *flags]


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # the name of a machine
        return False


def server_environment() -> dict[str, str]:
    """The environment of that command: the endpoints for weights belong to vLLM's development mode."""
    return {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, "VLLM_SERVER_DEV_MODE": "1"}
