"""Rollouts from vLLM in the training process: one engine per rank, on the rank's device."""

from __future__ import annotations

import gc
import os
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from rlrt_lightning.rollouts.base import Rollout, Sampling, Stops, room
from rlrt_lightning.rollouts.vllm_adapters import adapter_settings, obstacle
from rlrt_lightning.rollouts.vllm_common import (
    AdapterRefused,
    EngineError,
    VllmEngine,
    as_rollout,
    head_overrides,
    request,
    require_vllm,
)
from rlrt_lightning.runtime.errors import ConfigError, first_line
from rlrt_lightning.runtime.precision import Dtype
from rlrt_lightning.runtime.private.vllm import mute_rotary_warning
from rlrt_lightning.runtime.terminal import waiting_for

if TYPE_CHECKING:
    from rlrt_lightning.policy.model import Policy


T = TypeVar("T")

PART_TOKENS = 2048
"""Maximum number of tokens for which one scoring request computes logits, up to a block of the prefix cache more."""

MAX_LONG = 4
"""Maximum number of sequences that are scored in parts at the same time, so that the cache can hold their prefixes."""


class VllmColocateEngine(VllmEngine):
    """Samples with vLLM in the training process. The weights are copied into vLLM tensor by tensor before each epoch's
    rollouts; with LoRA only the adapters, after the first copy. On a GPU, vLLM sleeps during training and frees its
    memory; with LoRA it keeps the base weights in CPU memory meanwhile.

    With top-p, top-k or min-p the log-probs are those of the truncated distribution.

    Args:
        dtype: Type of vLLM's weights; null follows `trainer.precision`: bfloat16 for bf16-*, float16 for 16-*, and
            otherwise the policy's.
        max_rows: Maximum number of rollouts decoded at once.
        memory: Fraction of the GPU's memory that vLLM uses while awake, for weights and key-value cache.
        cpu_cache_gb: Size of the key-value cache in GiB when there is no GPU.
        tensor_parallel: Number of ranks that share one engine, each with a shard of the weights. They must be
            consecutive ranks on one machine.
        enforce_eager: Do not capture CUDA graphs: faster start, slower decoding. Always on without a GPU.
        sleep: Free the GPU's memory between rollouts; false keeps the weights and the cache there.
        tolerance: Largest mean |difference|, in nats, between vLLM's log-probs and the policy's in float32 after a
            sync; null means 1e-4 in float32, and in half precision four times the policy's own rounding on the same
            tokens.
        check_rollouts: Number of rollouts whose log-probs are compared after each sync.
        lora: How vLLM gets the adapters of `model.policy.lora`: auto sends them separately if vLLM can compute with
            them; merged adds them to the weights at each sync, which samples faster but rounds them with the weights.
    """

    def __init__(
        self,
        dtype: Dtype | None = None,
        max_rows: int = 256,
        memory: float = 0.4,
        cpu_cache_gb: int = 1,
        tensor_parallel: int = 1,
        enforce_eager: bool = False,
        sleep: bool = True,
        tolerance: float | None = None,
        check_rollouts: int = 4,
        lora: Literal["auto", "merged"] = "auto",
    ) -> None:
        super().__init__(dtype, tolerance, check_rollouts, lora)
        for name, value, good, range_ in (
            ("max_rows", max_rows, max_rows >= 1, "at least 1"),
            ("memory", memory, 0 < memory <= 1, "above 0 and at most 1"),
            ("cpu_cache_gb", cpu_cache_gb, cpu_cache_gb >= 1, "at least 1"),
            ("tensor_parallel", tensor_parallel, tensor_parallel >= 1, "at least 1"),
        ):
            if not good:
                raise ConfigError(f"data.engine.{name} is {value}; it has to be {range_}")
        require_vllm("VllmColocateEngine")
        self.max_rows = max_rows
        self.memory = memory
        self.cpu_cache_gb = cpu_cache_gb
        self.tensor_parallel = tensor_parallel
        self.enforce_eager = enforce_eager
        self.sleep = sleep
        self._llm: Any = None
        self._adapter: Any = None  # vLLM's request for the current adapters
        self._adapters_sent = 0
        self._group: Any = None
        self._awake = False
        self._requests = 0
        self._in_flight: set[str] = set()

    @property
    def ready(self) -> bool:
        """See `RolloutEngine.ready`."""
        return self._awake

    def release(self) -> None:
        """See `RolloutEngine.release`."""
        if self._llm is not None and self._awake and self.sleep and torch.cuda.is_available():
            # Level 2 discards the weights, which the next sync sends anyway, unless it sends only adapters.
            self._llm.sleep(level=1 if self._separate else 2)
            self._awake = False

    def device_bytes(self, policy: Policy, available: int | None) -> tuple[float, float]:
        """See `RolloutEngine.device_bytes`: weights and key-value cache, which take the share `memory` of a GPU."""
        if policy.device.type == "cuda":
            taken = self.memory * (available or 0)
            return taken, 0.0 if self.sleep else taken
        weights = sum(float(weight.numel()) for weight in policy.model.parameters())
        taken = getattr(torch, self.dtype_for(policy)).itemsize * weights / self.tensor_parallel
        return (taken + self.cpu_cache_gb * 2**30,) * 2

    def _obstacle(self, policy: Policy) -> str | None:
        return super()._obstacle(policy) or obstacle(policy, self.dtype_for(policy))

    def _send_weights(self, policy: Policy, weights: Iterator[tuple[str, Tensor]]) -> None:
        with self._updating(policy) as llm:
            self._adapter = None
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

    def _send_adapters(self, policy: Policy, weights: dict[str, Tensor]) -> None:
        from vllm.lora.request import LoRARequest

        assert policy.lora is not None
        self._adapters_sent += 1
        name = f"rlrt-{self._adapters_sent}"  # a new one, since it is part of the keys of the prefix cache
        with self._updating(policy) as llm, TemporaryDirectory(prefix="rlrt-adapter-") as folder:
            policy.lora.write(weights, Path(folder), policy.path)
            self._adapter = LoRARequest(name, self._adapters_sent, folder)
            try:
                llm.llm_engine.add_lora(self._adapter)  # replaces the previous one, since `max_loras` is 1
            except (ValueError, RuntimeError) as error:
                raise AdapterRefused(f"vLLM cannot load the adapters: {first_line(error)}") from error

    @contextmanager
    def _updating(self, policy: Policy) -> Iterator[Any]:
        """Yields the engine, ready for new weights or adapters."""
        llm = self._engine(policy)
        if self._in_flight:  # abandoned requests, which hold keys and values of outdated weights
            llm.llm_engine.abort_request(sorted(self._in_flight))
            self._in_flight.clear()
        asleep = not self._awake
        if asleep:
            torch.cuda.empty_cache()  # gives freed gradients and activations back to the device, for vLLM's allocator
            llm.wake_up(tags=["weights"])  # the cache only after loading: both at once may not fit
        yield llm
        if asleep:
            llm.wake_up(tags=["kv_cache"])
        if llm.reset_prefix_cache() is False:
            raise EngineError("data.engine: vLLM did not reset its prefix cache, which is from outdated weights")
        self._awake = True

    def _engine(self, policy: Policy) -> Any:
        if self._llm is not None:
            return self._llm
        cuda = torch.cuda.is_available()
        # Run vLLM in this process, so that weights are not copied between processes.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(self.cpu_cache_gb))
        alone = not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1)
        if not alone:  # vLLM finds the existing ranks as it would with torchrun
            os.environ["RANK"] = str(torch.distributed.get_rank())
            # Names the ranks' shared memory, so that the leftovers of a killed run are not reused.
            os.environ["VLLM_DIST_IDENT"] = os.environ.get("MASTER_PORT", "")
        self._group = self._engine_group()
        mute_rotary_warning()
        from vllm import LLM

        threads = torch.get_num_threads()
        with waiting_for("vLLM to start"):
            self._llm = LLM(
                policy.path,
                dtype=self.dtype_for(policy),
                hf_overrides=head_overrides(policy),
                load_format="dummy",  # the first sync sends the weights
                max_model_len=policy.max_positions,
                max_num_seqs=self.max_rows,
                **adapter_settings(policy) if self._separate else {},
                gpu_memory_utilization=self.memory,
                tensor_parallel_size=self.tensor_parallel,
                enforce_eager=self.enforce_eager or not cuda,
                enable_sleep_mode=self.sleep and cuda,
                enable_prefix_caching=True,
                # Without a GPU, chunked prefill breaks the seeds ("CPU Generator does not use offset").
                enable_chunked_prefill=None if cuda else False,
                logprobs_mode="processed_logprobs",  # at the sampling temperature
                distributed_executor_backend="uni" if alone else "external_launcher",
                disable_log_stats=True,
            )
        self._awake = True
        torch.set_num_threads(threads)
        # vLLM has initialized torch.distributed, so Lightning takes its single device for a distributed run.
        warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
        return self._llm

    def _sample(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[Rollout]:
        from vllm import SamplingParams

        policy = self._policy
        assert policy is not None
        stops = Stops.of(policy, sampling)
        requests: dict[str, tuple[int, int]] = {}
        for mine, pairs in self._gather_from_group(list(zip(prompts, seeds, strict=True))):
            for group, (prompt, seed) in enumerate(pairs):
                max_tokens = room(policy, prompt, sampling)
                for index in range(n):
                    # One request per rollout: it can be verified while its siblings are still running, and the prefix
                    # cache still processes the prompt only once.
                    kwargs = request(sampling, stops, max_tokens, seed, index)
                    params = SamplingParams(**kwargs, detokenize=bool(stops.strings))
                    requests[self._add(prompt, params)] = (group, index) if mine else (-1, -1)
        for key, done in self._finished(set(requests)):
            group, index = requests[key]
            if group < 0:
                continue  # belongs to another rank, which sees it too
            out = done.outputs[0]
            logp = [step[token].logprob for step, token in zip(out.logprobs, out.token_ids, strict=True)]
            yield as_rollout(group, index, prompts[group], out.token_ids, logp, out.finish_reason, policy)

    def score(self, sequences: Sequence[tuple[list[int], list[int]]], temperature: float = 1.0) -> list[Tensor]:
        """Log-probs of given responses, as returned by `Policy.score`. A shared prompt is processed once, except for
        its last tokens if they do not fill a block of the prefix cache. Long sequences are scored in parts, since vLLM
        may keep the logits of all tokens of a request in memory (vllm#5907).

        vLLM computes no log-prob after a token that it finds in its prefix cache, and no setting limits a cache hit to
        the prompt. If the hit includes a part of a response, the missing log-probs are copied from a sibling with the
        same beginning. If no sibling has them, as when the prompt ends at a block boundary, one of these siblings is
        scored without the cached blocks of other sequences.

        Raises:
            ConfigError: If the temperature is not 1; vLLM computes log-probs of prompts at temperature 1 only.
        """
        if temperature != 1:
            raise ConfigError(
                f"data.sampling.temperature is {temperature}; vLLM scores given tokens at temperature 1 only: set it "
                "to 1, or set model.teacher.scored_by to trainer"
            )
        scores = self._score(sequences, alone=False)
        missing = [int(score.isnan().nonzero().max()) + 1 if score.isnan().any() else 0 for score in scores]
        sources = siblings_with_same_beginning(sequences, missing)
        uncached = [i for i, source in sources.items() if source is None]
        # Even if there are none: ranks that share the engine must call it together.
        for i, score in zip(uncached, self._score([sequences[i] for i in uncached], alone=True), strict=True):
            scores[i] = score
        for i, source in sources.items():
            if source is not None:
                scores[i][: missing[i]] = scores[source][: missing[i]]
        return scores

    def _score(self, sequences: Sequence[tuple[list[int], list[int]]], alone: bool) -> list[Tensor]:
        """Log-probs of each response; NaN where vLLM computed none, after tokens in its prefix cache.

        Args:
            sequences: Pairs of prompt and response token ids.
            alone: Whether to hide the cached blocks of other sequences.
        """
        jobs: list[_Scoring] = []
        for mine, pairs in self._gather_from_group(list(sequences)):
            for i, (prompt, response) in enumerate(pairs):
                salt = f"{self._requests}-{len(jobs)}" if alone else None
                if response:
                    ends = part_ends(len(prompt), len(response), PART_TOKENS)
                    jobs.append(_Scoring(i if mine else None, prompt + response, len(prompt), ends, salt))
        scores = [torch.full((len(response),), torch.nan) for _, response in sequences]
        running: dict[str, _Scoring] = {}
        keys: set[str] = set()

        def begin(job: _Scoring) -> None:
            key = self._add_part(job)
            keys.add(key)
            running[key] = job

        long = deque(job for job in jobs if job.in_parts)
        for job in jobs:
            if not job.in_parts:
                begin(job)
        for _ in range(min(MAX_LONG, len(long))):
            begin(long.popleft())
        for key, done in self._finished(keys):
            job = running.pop(key)
            end = job.ends.pop(0)
            if job.index is not None and end > job.prompt:
                job.fill(scores[job.index], end, done)
            if job.ends:
                begin(job)
            elif job.in_parts and long:
                begin(long.popleft())
        return scores

    def _add_part(self, job: _Scoring) -> str:
        from vllm import SamplingParams

        end = job.ends[0]
        logprobs = 0 if end > job.prompt else None  # only responses are scored
        # By default, vLLM does not read its prefix cache for prompt log-probs.
        params = SamplingParams(
            max_tokens=1, prompt_logprobs=logprobs, skip_reading_prefix_cache=False, detokenize=False
        )
        return self._add(job.tokens[:end], params, job.salt)

    def _engine_group(self) -> Any:
        """The process group of the ranks that share this rank's engine; None if the rank has its own engine."""
        if self.tensor_parallel == 1:
            return None
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if world % self.tensor_parallel:
            raise ConfigError(
                f"data.engine.tensor_parallel is {self.tensor_parallel}; it has to divide the number of ranks ({world})"
            )
        starts = range(0, world, self.tensor_parallel)
        groups = [torch.distributed.new_group(list(range(s, s + self.tensor_parallel))) for s in starts]
        return groups[torch.distributed.get_rank() // self.tensor_parallel]

    def _gather_from_group(self, values: list[T]) -> list[tuple[bool, list[T]]]:
        """The values of each rank that shares the engine, with whether they are this rank's. All these ranks must make
        the same requests in the same order, since each computes a part of every step."""
        if self._group is None:
            return [(True, values)]
        gathered: list[Any] = [None] * self.tensor_parallel
        torch.distributed.all_gather_object(gathered, values, group=self._group)
        own_rank = torch.distributed.get_rank(self._group)
        return [(rank == own_rank, values) for rank, values in enumerate(gathered)]

    def _add(self, tokens: list[int], params: Any, salt: str | None = None) -> str:
        self._requests += 1
        key = str(self._requests)
        prompt: dict[str, Any] = {"prompt_token_ids": tokens}
        if salt is not None:  # requests share cached blocks only if they have the same salt
            prompt["cache_salt"] = salt
        self._llm.llm_engine.add_request(key, prompt, params, lora_request=self._adapter)
        self._in_flight.add(key)
        return key

    def _finished(self, keys: set[str]) -> Iterator[tuple[str, Any]]:
        engine = self._llm.llm_engine
        try:
            while keys:
                if not keys <= self._in_flight:
                    raise RuntimeError("these rollouts were aborted because the engine has received a later call")
                for done in engine.step():
                    if done.finished:
                        self._in_flight.discard(done.request_id)
                        if done.request_id in keys:
                            keys.discard(done.request_id)
                            yield done.request_id, done
        finally:  # the caller may have abandoned the iterator
            if abandoned := keys & self._in_flight:
                engine.abort_request(sorted(abandoned))
                self._in_flight -= abandoned

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self._llm, self._adapter, self._awake, self._has_base = None, None, False, False
        self._in_flight.clear()
        gc.collect()


@dataclass
class _Scoring:
    """The scoring of one sequence.

    Args:
        index: Index of the sequence; None if it belongs to another rank.
        tokens: Prompt and response.
        prompt: Length of the prompt.
        ends: The remaining requests, each as the length of the prefix that it scores.
        salt: Cache salt, which hides the cached blocks of sequences with a different one.
    """

    index: int | None
    tokens: list[int]
    prompt: int
    ends: list[int]
    salt: str | None

    def __post_init__(self) -> None:
        self.in_parts = len(self.ends) > 1

    def fill(self, score: Tensor, end: int, done: Any) -> None:
        """Writes the log-probs that the request for the first `end` tokens computed to `score`."""
        # If vLLM does not report its cache hit, assume that it found everything.
        found = end if done.num_cached_tokens is None else done.num_cached_tokens
        # The first computed position predicts the token after it.
        first = max(self.prompt, min(found + 1, end))
        computed = zip(done.prompt_logprobs[first:], self.tokens[first:end], strict=True)
        score[first - self.prompt : end - self.prompt] = torch.tensor([step[token].logprob for step, token in computed])


def part_ends(prompt: int, response: int, size: int) -> list[int]:
    """Splits the scoring of a sequence into requests of about `size` new tokens. Returns the length of the prefix that
    each request scores; it finds the previous prefix in the cache.

    A prompt longer than `size` is a request of its own without log-probs. All lengths but the last are odd: a prefix of
    whole blocks, whose sizes are even, would be cached up to its last token, and the next request would compute no
    log-prob for the token after it.

    Args:
        prompt: Length of the prompt, in tokens.
        response: Length of the response, in tokens.
        size: Number of new tokens per request, even.
    """
    begin = prompt - 1 - prompt % 2 if prompt > size else -1
    return [*([begin] if begin > 0 else []), *range(begin + size, prompt + response, size), prompt + response]


def siblings_with_same_beginning(
    sequences: Sequence[tuple[list[int], list[int]]], missing: Sequence[int]
) -> dict[int, int | None]:
    """For each response that lacks the log-probs of its first tokens, finds a response to the same prompt that begins
    with the same tokens.

    Args:
        sequences: N pairs of prompt and response token ids.
        missing: Number of first tokens of each response that have no log-prob, [N].

    Returns:
        For each such response, the index of a sibling whose log-probs are complete or completed earlier in the order
        of this dict; None if there is none.
    """
    sources: dict[int, int | None] = {}
    known: dict[tuple[int, ...], list[int]] = {}
    for i in sorted(range(len(sequences)), key=lambda i: missing[i]):
        prompt, response = sequences[i]
        siblings, n = known.setdefault(tuple(prompt), []), missing[i]
        if n:
            sources[i] = next((j for j in siblings if sequences[j][1][:n] == response[:n]), None)
        siblings.append(i)
    return sources
