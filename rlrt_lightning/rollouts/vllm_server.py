"""Rollouts from one or more vLLM servers, local or remote."""

from __future__ import annotations

import logging
import queue
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rlrt_lightning.rollouts.base import Rollout, Sampling, Stops, room
from rlrt_lightning.rollouts.vllm_client import EngineUnavailable, Server, Target
from rlrt_lightning.rollouts.vllm_common import AdapterRefused, EngineError, VllmEngine, as_rollout, request
from rlrt_lightning.runtime.credentials import refuse_credentials
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.files import written_aside
from rlrt_lightning.runtime.precision import Dtype
from rlrt_lightning.runtime.ranks import of_first_rank, rank

if TYPE_CHECKING:
    from rlrt_lightning.policy.model import Policy

log = logging.getLogger(__name__)

SHARD_BYTES = 4 * 2**30


class VllmServerEngine(VllmEngine):
    """Samples on vLLM servers (`python -m rlrt_lightning serve` starts one with the right flags).

    New weights are sent through a folder that the trainer and the servers share; with LoRA only the adapters, after the
    first time. Each server reports the version of its weights; responses from outdated weights, as after a server's
    restart, are dropped and requested again. With top-p, top-k or min-p the log-probs are those of the truncated
    distribution.

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
        lora: How the servers get the adapters of `model.policy.lora`: auto sends them separately if the servers can
            compute with them; merged adds them to the weights at each sync, which samples faster but rounds them with
            the weights.
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
        lora: Literal["auto", "merged"] = "auto",
    ) -> None:
        super().__init__(dtype, tolerance, check_rollouts, lora)
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
        self._servers: list[Server] = []
        self._version = 0
        self._target: Target | None = None

    @property
    def ready(self) -> bool:
        """See `RolloutEngine.ready`."""
        return self._version > 0

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        for server in self._servers:
            server.client.close()
        self._servers, self._version, self._target, self._has_base = [], 0, None, False

    def _send_weights(self, policy: Policy, weights: Iterator[tuple[str, Tensor]]) -> None:
        folder = self._new_folder()
        write_weights(weights, folder, write=rank() == 0)
        self._set_target(Target(folder))

    def _send_adapters(self, policy: Policy, weights: dict[str, Tensor]) -> None:
        assert policy.lora is not None
        assert self._target is not None
        folder = self._new_folder()
        if rank() == 0:
            with written_aside(folder) as aside:
                policy.lora.write(weights, aside, policy.path)
        self._set_target(Target(self._target.weights, folder))

    def _new_folder(self) -> Path:
        # Versions are timestamps, since servers may outlive this run and still have an earlier run's weights.
        self._version = of_first_rank(max(self._version + 1, time.time_ns()))
        return Path(self.weights).resolve() / str(self._version)

    def _set_target(self, target: Target) -> None:
        """Makes the servers load weights; all ranks wait until they have them.

        Raises:
            AdapterRefused: If a server cannot compute with the adapters.
        """
        previous, self._target = self._target, target
        if not self._servers:
            self._servers = [Server(url, self.timeout_s, self.patience_s, self.concurrency) for url in self.urls]
        for server in self._servers:
            server.target = target
        refused = None
        if rank() == 0:
            try:
                self._update_servers()
            except AdapterRefused as error:
                refused = str(error)
        if (refused := of_first_rank(refused)) is not None:
            raise AdapterRefused(refused)
        if rank() == 0:
            # A request that arrives late may still name the previous adapters.
            self._remove_old_folders({target.weights, previous.adapters if previous else None})

    def _remove_old_folders(self, kept: set[Path | None]) -> None:
        for old in Path(self.weights).resolve().iterdir():
            if old.name.isdigit() and int(old.name) < self._version and old not in kept:
                shutil.rmtree(old, ignore_errors=True)

    def _update_servers(self) -> None:
        """Loads the target weights into all servers concurrently.

        Raises:
            EngineError: If no server responds, or one rejects the weights.
        """
        with ThreadPoolExecutor(len(self._servers)) as pool:
            failed = [error for error in pool.map(Server.try_update, self._servers) if error is not None]
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
        for i, answer in self._request_all(bodies, self._servers):
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
        return self._score(sequences, self._servers)

    def _score(self, sequences: Sequence[tuple[list[int], list[int]]], servers: Sequence[Server]) -> list[Tensor]:
        nonempty = [i for i, (_, response) in enumerate(sequences) if response]
        prompts = [sequences[i][0] + sequences[i][1] for i in nonempty]
        bodies = [{"prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0} for prompt in prompts]
        scores: list[Tensor] = [torch.empty(0)] * len(sequences)
        for job, answer in self._request_all(bodies, servers):
            i = nonempty[job]
            response = sequences[i][1]
            steps = answer["choices"][0]["prompt_logprobs"][-len(response) :]
            scores[i] = torch.tensor([s[str(t)]["logprob"] for s, t in zip(steps, response, strict=True)])
        return scores

    def _probe_scores(self, sequences: Sequence[tuple[list[int], list[int]]]) -> dict[str, list[Tensor]]:
        def scores(server: Server) -> list[Tensor] | None:
            try:
                return self._score(sequences, [server])
            except NoServer as error:
                log.warning("%s; its weights are not checked", error)
                return None

        with ThreadPoolExecutor(len(self._servers)) as pool:
            results = zip(self._servers, pool.map(scores, self._servers), strict=True)
        return {server.url: found for server, found in results if found is not None}

    def _request_all(
        self, bodies: Sequence[dict[str, Any]], servers: Sequence[Server]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the servers' answers as they arrive, with the index of the request. Each server takes the next
        request when it has capacity.

        Raises:
            NoServer: If no server responds any more.
            EngineError: If one rejects a request.
        """
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(len(bodies)):
            waiting.put(i)
        answered: queue.SimpleQueue[tuple[int, dict[str, Any]] | Exception] = queue.SimpleQueue()
        stop = threading.Event()

        def work(server: Server) -> None:
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

        workers = [(server, number) for number in range(self.concurrency) for server in servers]
        workers = workers[: max(len(bodies), len(servers))]
        for server, number in workers:
            threading.Thread(target=work, args=(server,), name=f"{server.url}-{number}", daemon=True).start()
        active = len(workers)
        try:
            missing = len(bodies)
            while missing:
                answer = answered.get()
                if isinstance(answer, EngineUnavailable):
                    active -= 1
                    if active == 0:
                        raise NoServer(str(answer))
                elif isinstance(answer, Exception):
                    raise answer
                else:
                    missing -= 1
                    yield answer
        finally:
            stop.set()


class NoServer(EngineError):
    """No server responds any more."""


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
