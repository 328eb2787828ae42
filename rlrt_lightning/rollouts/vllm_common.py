"""Shared code of the two vLLM engines: requests, and the check that vLLM has the policy's weights."""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

import torch

from rlrt_lightning.rollouts.base import Rollout, RolloutEngine, Sampling, Stops, empty_rollouts, room
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.seeding import derive_seed

if TYPE_CHECKING:
    from rlrt_lightning.policy.model import Policy

Dtype = Literal["float32", "bfloat16", "float16"]

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.05}
"""Largest mean |difference|, in nats, between vLLM's log-probs and the policy's that rounding can explain. In float32
it is about 1e-6; if the output head was not sent, a 1 % change of its weights causes more than 1e-2."""


MAX_TEMPERATURE = 2.0
"""The highest temperature that vLLM accepts."""


class EngineError(ConfigError):
    """An engine failed. Training can be resumed from the last checkpoint."""


class VllmEngine(RolloutEngine):
    """Base class of the engine in the training process and the engine on servers.

    Args:
        dtype: Type of vLLM's weights; None uses the policy's.
        tolerance: Largest mean |difference|, in nats, between vLLM's log-probs and the policy's; None means 1e-4 in
            float32 and 0.05 in half precision.
        check_rollouts: Number of rollouts whose log-probs are compared after each sync.
    """

    cuts_before_logp = True

    def __init__(self, dtype: Dtype | None, tolerance: float | None, check_rollouts: int) -> None:
        if tolerance is not None and tolerance <= 0:
            raise ConfigError(f"data.engine.tolerance is {tolerance}; it has to be above 0, or null")
        if check_rollouts < 1:
            raise ConfigError(f"data.engine.check_rollouts is {check_rollouts}; it has to be at least 1")
        self.dtype = dtype
        self.tolerance = tolerance
        self.check_rollouts = check_rollouts
        self._policy: Policy | None = None
        self._unchecked = False

    def sync(self, policy: Policy) -> None:
        """See `RolloutEngine.sync`."""
        self._policy = policy
        self._send_weights(policy)
        self._unchecked = True

    def generate(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[Rollout]:
        """See `RolloutEngine.generate`."""
        if self._policy is None or not self.ready:
            raise RuntimeError("sync the engine with a policy before it generates")
        if sampling.temperature > MAX_TEMPERATURE:
            raise ConfigError(
                f"sampling.temperature is {sampling.temperature}; vLLM takes at most {MAX_TEMPERATURE:g}: lower it, or "
                "use TransformersEngine"
            )
        yield from empty_rollouts(self._policy, prompts, n, sampling)
        rollouts = self._sample_fitting(prompts, n, sampling, seeds)
        if self._unchecked and sampling.temperature > 0 and not sampling.cuts:
            first = list(islice(rollouts, self.check_rollouts))
            self._check(first, sampling.temperature)
            rollouts = chain(first, rollouts)
        yield from rollouts

    def _sample_fitting(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[Rollout]:
        """Calls `_sample` with the prompts that leave room for a response; vLLM rejects the others."""
        assert self._policy is not None
        fitting = [i for i, prompt in enumerate(prompts) if room(self._policy, prompt, sampling)]
        for rollout in self._sample([prompts[i] for i in fitting], n, sampling, [seeds[i] for i in fitting]):
            rollout.group = fitting[rollout.group]
            yield rollout

    @abstractmethod
    def _send_weights(self, policy: Policy) -> None:
        """Sends the policy's weights to vLLM and resets its prefix cache."""

    @abstractmethod
    def _sample(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[Rollout]:
        """See `generate`; the weights are not checked yet."""

    def _check(self, rollouts: Sequence[Rollout], temperature: float) -> None:
        """Compares vLLM's log-probs with the policy's.

        Raises:
            EngineError: If they differ by more than rounding can explain.
        """
        assert self._policy is not None
        self._unchecked = False
        # Even without rollouts: with sharded weights every rank must take part.
        own = self._policy.score([(r.prompt_ids, r.response_ids) for r in rollouts], temperature)
        if not rollouts:
            return
        difference = torch.cat([(r.logp_sampler - logp).abs() for r, logp in zip(rollouts, own, strict=True)])
        if not len(difference):  # all responses are empty
            return
        limit = self.tolerance or TOLERANCE[self.dtype or self._policy.dtype]
        if not float(difference.mean()) <= limit:  # also true for NaN
            raise EngineError(
                "data.engine: after a sync vLLM's log-probs differ from the policy's by "
                f"{float(difference.mean()):.3g} nats on average (maximum {float(difference.max()):.3g}), more than "
                f"data.engine.tolerance ({limit:g}) allows: vLLM has different weights or another precision"
            )


def require_vllm(engine: str) -> None:
    """Checks that vLLM is installed.

    Args:
        engine: What needs it, for the error message.

    Raises:
        ConfigError: If vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"data.engine: {engine} needs vLLM, which is not installed: pip install 'rlrt-lightning[vllm]'"
        )


def request(sampling: Sampling, stops: Stops, max_tokens: int, seed: int, index: int) -> dict[str, Any]:
    """The sampling parameters of one rollout under vLLM's names, which `vllm.SamplingParams` and the server share.

    Args:
        sampling: How tokens are sampled.
        stops: The tokens and strings that end a response.
        max_tokens: Maximum length of the response, in tokens.
        seed: The seed of the prompt.
        index: Index of the rollout in its group.
    """
    return {
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,  # otherwise a server uses the model's generation config
        "stop": stops.strings,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # in the text that is searched for stop strings
        "stop_token_ids": stops.ids,
        "seed": derive_seed(seed, "sampling", index),
        "logprobs": 0,
    }


def as_rollout(
    group: int,
    index: int,
    prompt: list[int],
    response: Sequence[int],
    logp: Sequence[float],
    finish_reason: str | None,
    policy: Policy,
) -> Rollout:
    """Converts one finished vLLM request to a rollout."""
    return Rollout(
        group=group,
        index=index,
        prompt_ids=prompt,
        response_ids=list(response),
        logp_sampler=torch.tensor(logp, dtype=torch.float32),
        truncated=finish_reason == "length",
        text=policy.decode(response),
    )
