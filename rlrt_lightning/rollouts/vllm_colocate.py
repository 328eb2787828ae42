"""vLLM in the training process: one engine for each rank, on the rank's own device."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from rlrt_lightning.rollouts.base import Rollout, Sampling, Stops, room
from rlrt_lightning.rollouts.vllm_common import Dtype, EngineError, VllmEngine, as_rollout, request, require_vllm
from rlrt_lightning.runtime.errors import ConfigError

if TYPE_CHECKING:
    from rlrt_lightning.policy.model import Policy


T = TypeVar("T")


class VllmColocateEngine(VllmEngine):
    """Samples with vLLM in the training process. The weights are streamed into it before each epoch's rollouts, tensor
    by tensor; on a GPU it sleeps while the policy is trained, and its memory is free for that.

    With top-p, top-k or min-p the log-probs are those after the cut.

    Args:
        dtype: Type of vLLM's weights; null takes the policy's.
        max_rows: Rollouts that are decoded at once.
        memory: Share of the GPU's memory that vLLM takes while it is awake, weights and key-value cache.
        cpu_cache_gb: Size of the key-value cache in GiB where there is no GPU.
        tensor_parallel: Ranks that share one engine, each with a part of the weights; they have to be neighbours, and
            on one machine.
        enforce_eager: Do not capture CUDA graphs: starts faster, decodes slower. Always so without a GPU.
        sleep: Free the GPU's memory between rollouts; off keeps weights and cache there.
        tolerance: Largest mean |difference|, in nats, between vLLM's log-probs and the policy's own after a sync; null
            is 1e-4 in float32 and 0.05 in half precision.
        check_rollouts: Rollouts whose log-probs are compared after each sync.
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
    ) -> None:
        super().__init__(dtype, tolerance, check_rollouts)
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
            self._llm.sleep(level=2)  # drops the weights as well: the next sync sends them anyhow
            self._awake = False

    def _send_weights(self, policy: Policy) -> None:
        llm = self._engine(policy)
        if self._in_flight:  # of a round whose caller has stopped listening: they hold keys and values of old weights
            llm.llm_engine.abort_request(sorted(self._in_flight))
            self._in_flight.clear()
        asleep = not self._awake
        if asleep:
            llm.wake_up(tags=["weights"])  # the cache only when the weights are in: both at once may not fit
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": policy.merged_weights()})
        if asleep:
            llm.wake_up(tags=["kv_cache"])
        if llm.reset_prefix_cache() is False:
            raise EngineError("data.engine: vLLM did not empty its prefix cache, which holds what old weights computed")
        self._awake = True

    def _engine(self, policy: Policy) -> Any:
        if self._llm is not None:
            return self._llm
        cuda = torch.cuda.is_available()
        # In this process, so that weights go in without a copy between processes.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(self.cpu_cache_gb))
        alone = not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1)
        if not alone:  # the ranks are there already: vLLM finds itself among them as among torchrun's
            os.environ["RANK"] = str(torch.distributed.get_rank())
            # Names the ranks' shared memory: what a run that was killed has left behind is not taken for this one's.
            os.environ["VLLM_DIST_IDENT"] = os.environ.get("MASTER_PORT", "")
        self._group = self._engine_group()
        from vllm import LLM

        threads = torch.get_num_threads()
        self._llm = LLM(
            policy.path,
            dtype=self.dtype or policy.dtype,
            load_format="dummy",  # the first sync brings the weights
            max_model_len=policy.max_positions,
            max_num_seqs=self.max_rows,
            gpu_memory_utilization=self.memory,
            tensor_parallel_size=self.tensor_parallel,
            enforce_eager=self.enforce_eager or not cuda,
            enable_sleep_mode=self.sleep and cuda,
            enable_prefix_caching=True,
            # Without a GPU a prompt that is read in two parts breaks the seeds ("CPU Generator does not use offset").
            enable_chunked_prefill=None if cuda else False,
            logprobs_mode="processed_logprobs",  # at the sampling temperature
            distributed_executor_backend="uni" if alone else "external_launcher",
            disable_log_stats=True,
        )
        self._awake = True
        torch.set_num_threads(threads)
        # vLLM has set torch.distributed up for itself, for which Lightning takes its own single device.
        warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
        return self._llm

    def _sample(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[Rollout]:
        from vllm import SamplingParams

        policy = self._policy
        assert policy is not None
        stops = Stops.of(policy, sampling)
        asked: dict[str, tuple[int, int]] = {}
        for mine, pairs in self._of_all_in_group(list(zip(prompts, seeds, strict=True))):
            for group, (prompt, seed) in enumerate(pairs):
                most = room(policy, prompt, sampling)
                for index in range(n):
                    # One request for each: a rollout can be verified while its siblings go on, and the prefix cache
                    # reads the prompt once for all.
                    wanted = request(sampling, stops, most, seed, index)
                    params = SamplingParams(**wanted, detokenize=bool(stops.strings))
                    asked[self._add(prompt, params)] = (group, index) if mine else (-1, -1)
        for key, done in self._finished(set(asked)):
            group, index = asked[key]
            if group < 0:
                continue  # another rank's, which sees it too
            out = done.outputs[0]
            logp = [step[token].logprob for step, token in zip(out.logprobs, out.token_ids, strict=True)]
            yield as_rollout(group, index, prompts[group], out.token_ids, logp, out.finish_reason, policy)

    def score(self, sequences: Sequence[tuple[list[int], list[int]]], temperature: float = 1.0) -> list[Tensor]:
        """Log-probs of given responses after given prompts, as `Policy.score`; a prompt that several share is read
        once, but for its last tokens, which fill no block of the prefix cache.

        vLLM computes no log-prob after a token that it finds in its prefix cache, and has no setting that keeps a
        request from finding more there than the prompt. Where it finds the beginning of a response, too, the log-probs
        of that beginning come from a sibling with the same one; where none has them, as with a prompt that ends with a
        block, one of those siblings is scored without the cache.

        Raises:
            ConfigError: If the temperature is not 1, at which vLLM gives no log-probs of prompts.
        """
        if temperature != 1:
            raise ConfigError(f"vLLM scores given tokens at temperature 1 only, and data.sampling has {temperature}")
        scores = self._score(sequences, read_cache=True)
        missing = [len(response) - len(score) for (_, response), score in zip(sequences, scores, strict=True)]
        sources = siblings_that_begin_alike(sequences, missing)
        alone = [i for i, source in sources.items() if source is None]
        # Also without any: ranks that share the engine ask together.
        for i, score in zip(alone, self._score([sequences[i] for i in alone], read_cache=False), strict=True):
            scores[i] = score
        for i, source in sources.items():
            if source is not None:
                scores[i] = torch.cat([scores[source][: missing[i]], scores[i]])
        return scores

    def _score(self, sequences: Sequence[tuple[list[int], list[int]]], read_cache: bool) -> list[Tensor]:
        """Log-probs of each response's last tokens, those that vLLM did not find in its prefix cache."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, prompt_logprobs=0, skip_reading_prefix_cache=not read_cache, detokenize=False
        )
        asked: dict[str, int] = {}
        for mine, all_ in self._of_all_in_group(list(sequences)):
            for i, (prompt, response) in enumerate(all_):
                if response:
                    asked[self._add(prompt + response, params)] = i if mine else -1
        scores: list[Tensor] = [torch.empty(0)] * len(sequences)
        for key, done in self._finished(set(asked)):
            if asked[key] < 0:
                continue
            prompt, response = sequences[asked[key]]
            unknown = len(prompt + response)  # where vLLM does not say what it found, nothing is taken for computed
            found = (unknown if done.num_cached_tokens is None else done.num_cached_tokens) if read_cache else 0
            # The first place after what was found predicts the token behind it.
            first = max(len(prompt), min(found + 1, len(prompt + response)))
            told = zip(done.prompt_logprobs[first:], response[first - len(prompt) :], strict=True)
            scores[asked[key]] = torch.tensor([step[token].logprob for step, token in told])
        return scores

    def _engine_group(self) -> Any:
        """The ranks that share an engine with this one; None where it has one of its own."""
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

    def _of_all_in_group(self, values: list[T]) -> list[tuple[bool, list[T]]]:
        """What each rank that shares the engine asks of it, and whether it is this one: all of them have to ask the
        same in the same order, since each computes a part of every step."""
        if self._group is None:
            return [(True, values)]
        every: list[Any] = [None] * self.tensor_parallel
        torch.distributed.all_gather_object(every, values, group=self._group)
        mine = torch.distributed.get_rank(self._group)
        return [(rank == mine, values) for rank, values in enumerate(every)]

    def _add(self, tokens: list[int], params: Any) -> str:
        self._requests += 1
        key = str(self._requests)
        self._llm.llm_engine.add_request(key, {"prompt_token_ids": tokens}, params)
        self._in_flight.add(key)
        return key

    def _finished(self, keys: set[str]) -> Iterator[tuple[str, Any]]:
        engine = self._llm.llm_engine
        try:
            while keys:
                if not keys <= self._in_flight:
                    raise RuntimeError("these rollouts were given up: the engine was asked for others since")
                for done in engine.step():
                    if done.finished:
                        self._in_flight.discard(done.request_id)
                        if done.request_id in keys:
                            keys.discard(done.request_id)
                            yield done.request_id, done
        finally:  # whoever asked may have stopped listening
            if given_up := keys & self._in_flight:
                engine.abort_request(sorted(given_up))
                self._in_flight -= given_up

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self._llm, self._awake = None, False
        self._in_flight.clear()
        gc.collect()


def siblings_that_begin_alike(
    sequences: Sequence[tuple[list[int], list[int]]], missing: Sequence[int]
) -> dict[int, int | None]:
    """For each response that lacks the log-probs of its beginning, one after the same prompt that begins alike.

    Args:
        sequences: Token ids of prompt and response, N of them.
        missing: Tokens of each response that have no log-prob, the first ones, [N].

    Returns:
        The number of the one whose log-probs are known, or come earlier in this order; None where there is no such one.
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
