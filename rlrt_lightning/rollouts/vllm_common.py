"""What the two vLLM engines share: what vLLM is asked for, and the proof that it has the policy's weights."""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

import torch

from rlrt_lightning.rollouts.base import Rollout, RolloutEngine, Sampling, Stops, room, without_room
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.seeding import derive_seed

if TYPE_CHECKING:
    from rlrt_lightning.policy.model import Policy

Dtype = Literal["float32", "bfloat16", "float16"]

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.05}
"""Mean |difference| in nats between vLLM's log-probs and the policy's own that arithmetic explains. In float32 it is
about 1e-6; a head that was not sent is off by more than 1e-2 after 1 % of change."""


HOTTEST = 2.0
"""The highest temperature that vLLM samples at."""


class EngineError(ConfigError):
    """An engine that cannot go on. What was trained before it can be resumed from the last checkpoint."""


class VllmEngine(RolloutEngine):
    """What the engine in the training process and the one on servers share.

    Args:
        dtype: Type of vLLM's weights; None: the policy's.
        tolerance: Largest mean |difference|, in nats, between vLLM's log-probs and the policy's own; None: 1e-4 in
            float32, 0.05 in half precision.
        check_rollouts: After each sync the log-probs of so many rollouts are compared.
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
        if sampling.temperature > HOTTEST:
            raise ConfigError(
                f"sampling.temperature is {sampling.temperature}; vLLM takes at most {HOTTEST:g}: lower it, or take "
                "TransformersEngine"
            )
        yield from without_room(self._policy, prompts, n, sampling)
        rollouts = self._sample_fitting(prompts, n, sampling, seeds)
        if self._unchecked and sampling.temperature > 0 and not sampling.cuts:
            first = list(islice(rollouts, self.check_rollouts))
            self._check(first, sampling.temperature)
            rollouts = chain(first, rollouts)
        yield from rollouts

    def _sample_fitting(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[Rollout]:
        """`_sample` of the prompts that leave room for a response: vLLM refuses others."""
        assert self._policy is not None
        fitting = [i for i, prompt in enumerate(prompts) if room(self._policy, prompt, sampling)]
        for rollout in self._sample([prompts[i] for i in fitting], n, sampling, [seeds[i] for i in fitting]):
            rollout.group = fitting[rollout.group]
            yield rollout

    @abstractmethod
    def _send_weights(self, policy: Policy) -> None:
        """Gives vLLM the policy's weights, and empties its prefix cache."""

    @abstractmethod
    def _sample(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[Rollout]:
        """`generate`, of weights that may be wrong."""

    def _check(self, rollouts: Sequence[Rollout], temperature: float) -> None:
        """Compares vLLM's log-probs with the policy's own.

        Raises:
            EngineError: If they differ by more than arithmetic explains.
        """
        assert self._policy is not None
        self._unchecked = False
        # Also without rollouts: with sharded weights all ranks compute together.
        own = self._policy.score([(r.prompt_ids, r.response_ids) for r in rollouts], temperature)
        if not rollouts:
            return
        apart = torch.cat([(r.logp_sampler - logp).abs() for r, logp in zip(rollouts, own, strict=True)])
        if not len(apart):  # of responses without a token
            return
        limit = self.tolerance or TOLERANCE[self.dtype or self._policy.dtype]
        if not float(apart.mean()) <= limit:  # NaN is no agreement either
            raise EngineError(
                f"data.engine: after a sync vLLM's log-probs differ from the policy's by {float(apart.mean()):.3g} "
                f"nats on average ({float(apart.max()):.3g} at most), more than data.engine.tolerance ({limit:g}) "
                "allows: it samples from other weights than the policy's, or in another precision"
            )


def require_vllm(engine: str) -> None:
    """Says at once what is missing.

    Raises:
        ConfigError: If vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"data.engine: {engine} needs vLLM, which is not installed: pip install 'rlrt-lightning[vllm]'"
        )


def request(sampling: Sampling, stops: Stops, most: int, seed: int, index: int) -> dict[str, Any]:
    """vLLM's names for how one rollout of at most so many tokens is sampled. `vllm.SamplingParams` and the server take
    the same."""
    return {
        "max_tokens": most,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,  # or a server takes that of the model's generation config
        "stop": stops.strings,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # in the text that stop strings are looked for in
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
    """What vLLM says of one finished request."""
    return Rollout(
        group=group,
        index=index,
        prompt_ids=prompt,
        response_ids=list(response),
        logp_sampler=torch.tensor(logp, dtype=torch.float32),
        truncated=finish_reason == "length",
        text=policy.decode(response),
    )
