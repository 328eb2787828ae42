"""vLLM in the training process: one engine for each rank, on the rank's own device."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from rlrt_lightning.errors import ConfigError
from rlrt_lightning.rollouts.base import Rollout, Sampling
from rlrt_lightning.rollouts.vllm_common import Dtype, VllmEngine, as_rollout, request, require_vllm

if TYPE_CHECKING:
    from rlrt_lightning.policy import Policy


T = TypeVar("T")


class VllmColocateEngine(VllmEngine):
    """Samples with vLLM in the training process. The weights are streamed into it before each epoch's roll-outs, tensor
    by tensor; on a GPU it sleeps while the policy is trained, and its memory is free for that.

    With top-p, top-k or min-p the log-probs are those after the cut.

    Args:
        dtype: Type of vLLM's weights; null takes the policy's.
        max_rows: Roll-outs that are decoded at once.
        memory: Share of the GPU's memory that vLLM takes while it is awake, weights and key-value cache.
        cpu_cache_gb: Size of the key-value cache in GiB where there is no GPU.
        tensor_parallel: Ranks that share one engine, each with a part of the weights; they have to be neighbours, and
            on one machine.
        enforce_eager: Do not capture CUDA graphs: starts faster, decodes slower. Always so without a GPU.
        sleep: Free the GPU's memory between roll-outs; off keeps weights and cache there.
        tolerance: Largest mean |difference|, in nats, between vLLM's log-probs and the policy's own after a sync; null
            is 1e-4 in float32 and 0.05 in half precision.
        check_rollouts: Roll-outs whose log-probs are compared after each sync.
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
        asleep = not self._awake
        if asleep:
            llm.wake_up(tags=["weights"])  # the cache only when the weights are in: both at once may not fit
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": policy.merged_weights()})
        if asleep:
            llm.wake_up(tags=["kv_cache"])
        llm.reset_prefix_cache()
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
        asked: dict[str, tuple[int, int]] = {}
        for mine, pairs in self._of_all_in_group(list(zip(prompts, seeds, strict=True))):
            for group, (prompt, seed) in enumerate(pairs):
                for index in range(n):
                    # One request for each: a roll-out can be verified while its siblings go on, and the prefix cache
                    # reads the prompt once for all.
                    params = SamplingParams(**request(sampling, seed, index, policy), detokenize=bool(sampling.stop))
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
        once.

        Raises:
            ConfigError: If the temperature is not 1, at which vLLM gives no log-probs of prompts.
        """
        from vllm import SamplingParams

        if temperature != 1:
            raise ConfigError(f"vLLM scores given tokens at temperature 1 only, and data.sampling has {temperature}")
        # Log-probs are wanted of the response alone, which is never in the cache: its prompt may come from there.
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, skip_reading_prefix_cache=False, detokenize=False)
        asked: dict[str, int] = {}
        for mine, all_ in self._of_all_in_group(list(sequences)):
            asked |= {
                self._add(prompt + response, params): i if mine else -1 for i, (prompt, response) in enumerate(all_)
            }
        scores: list[Tensor] = [torch.empty(0)] * len(sequences)
        for key, done in self._finished(set(asked)):
            if asked[key] < 0:
                continue
            response = sequences[asked[key]][1]
            steps = done.prompt_logprobs[len(done.prompt_logprobs) - len(response) :]
            scores[asked[key]] = torch.tensor([s[t].logprob for s, t in zip(steps, response, strict=True)])
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
        return key

    def _finished(self, keys: set[str]) -> Iterator[tuple[str, Any]]:
        engine = self._llm.llm_engine
        try:
            while keys:
                for done in engine.step():
                    if done.finished:
                        keys.discard(done.request_id)
                        yield done.request_id, done
        finally:  # whoever asked may have stopped listening
            if keys:
                engine.abort_request(list(keys))

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self._llm, self._awake = None, False
        gc.collect()
