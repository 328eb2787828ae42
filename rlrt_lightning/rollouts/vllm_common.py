"""Shared code of the two vLLM engines: requests, and the check that vLLM has the policy's weights."""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rlrt_lightning.policy.lora import unusual_target
from rlrt_lightning.rollouts.base import Rollout, RolloutEngine, Sampling, Stops, empty_rollouts, room
from rlrt_lightning.rollouts.sync_check import (
    MIN_CHANGED_TENSORS,
    Measured,
    Probe,
    checksum,
    deviating,
    incomplete,
    policy_log_probs,
    skipped,
)
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.precision import Dtype
from rlrt_lightning.runtime.seeding import derive_seed

if TYPE_CHECKING:
    from rlrt_lightning.policy.model import Policy

HEAD = "lm_head.weight"
"""The output head. It is always sent, since vLLM may keep its own copy of a head that is tied to the embeddings."""

MAX_TEMPERATURE = 2.0
"""The highest temperature that vLLM accepts."""


class EngineError(ConfigError):
    """An engine failed. Training can be resumed from the last checkpoint."""


class AdapterRefused(EngineError):
    """vLLM cannot compute with the policy's adapters."""


class VllmEngine(RolloutEngine):
    """Base class of the engine in the training process and the engine on servers.

    A policy with LoRA adapters is sent as its base weights, once, and its adapters at each sync; if vLLM cannot compute
    with them, as the weights with the adapters merged into them.

    After each sync, the log-probs of the first rollouts are compared with the policy's (`tolerance`), and on each
    server those of up to 16 prompts with the policy's and with their values after earlier syncs (`sync_check`). What is
    detected:

    - A tensor that is not sent: always.
    - A sync that vLLM ignores: at any size of the update, even one optimizer step with a learning rate of 1e-6, if a
      tenth of the tensors differ in vLLM's dtype.
    - Tensors that are sent but not loaded, in float32: once they change log-probs by 1e-5 nats, as the output head does
      in one such step.
    - The same in half precision: once they account for a tenth of the change since the first sync and for 6 / sqrt(N)
      times the rounding, where N is the number of prompt tokens (0.01 nats for N = 500 and a rounding of 0.04 nats), or
      for four times the rounding. A missing head is therefore detected late, but has little effect until then.

    Args:
        dtype: Type of vLLM's weights; None uses the type that the trainer computes in.
        tolerance: Largest mean |difference|, in nats, between vLLM's log-probs and the policy's in float32; None uses
            `sync_check.Measured.limit`.
        check_rollouts: Number of rollouts whose log-probs are compared after each sync.
        lora: "auto" sends LoRA adapters separately if vLLM can compute with them, "merged" never does.
    """

    cuts_before_logp = True

    def __init__(
        self, dtype: Dtype | None, tolerance: float | None, check_rollouts: int, lora: Literal["auto", "merged"]
    ) -> None:
        if tolerance is not None and tolerance <= 0:
            raise ConfigError(f"data.engine.tolerance is {tolerance}; it has to be above 0, or null")
        if check_rollouts < 1:
            raise ConfigError(f"data.engine.check_rollouts is {check_rollouts}; it has to be at least 1")
        self.dtype = dtype
        self.tolerance = tolerance
        self.check_rollouts = check_rollouts
        self.lora = lora
        self._policy: Policy | None = None
        self._separate: bool | None = None  # whether adapters are sent separately; None before the first sync
        self._has_base = False
        self._unchecked = self._unprobed = False
        self._probe: Probe | None = None
        self._first: dict[str, Measured] = {}  # of each server, after its first sync
        self._latest: dict[str, Measured] = {}
        self._sent: dict[str, Tensor] = {}  # the checksum of each tensor
        self._changed = False  # whether the last sync sent different weights

    def dtype_for(self, policy: Policy) -> Dtype:
        """Type of vLLM's weights: `dtype` if set, otherwise the trainer's half precision or the policy's dtype."""
        return self.dtype or self.half or policy.dtype

    def sync(self, policy: Policy) -> None:
        """See `RolloutEngine.sync`."""
        self._policy = policy
        before, self._sent = self._sent, {}
        if self._separate is None:
            self._try_adapters(policy)
        elif self._separate:
            self._send_base_and_adapters(policy)
        if not self._separate:
            self._sent, dtype = {}, getattr(torch, self.dtype_for(policy))
            self._send_weights(policy, self._recorded(policy, policy.merged_weights(dtype)))
            self._check_sent(HEAD)
        self._check_sent(*before)
        changed = [not torch.equal(value, before[name]) for name, value in self._sent.items() if name in before]
        self._changed = sum(changed) > MIN_CHANGED_TENSORS * len(changed)
        self._unchecked = self._unprobed = True

    def _try_adapters(self, policy: Policy) -> None:
        """At the first sync: sends the adapters separately, unless that is not possible."""
        self._separate = False
        if policy.lora is None:
            return
        reason = self._obstacle(policy)
        if reason is None:
            self._separate = True
            try:
                self._send_base_and_adapters(policy)
            except AdapterRefused as error:
                self._separate, reason = False, str(error)
        if reason is not None:
            rank_zero_info(f"data.engine: vLLM gets the LoRA adapters merged into the weights: {reason}")

    def _obstacle(self, policy: Policy) -> str | None:
        """Why the adapters have to be merged, as far as it is known before they are sent."""
        if self.lora == "merged":
            return "data.engine.lora is merged"
        if (name := unusual_target(policy.model)) is not None:
            return f"{name} has an adapter, and vLLM needs adapters of linear layers other than the head"
        return None

    def _send_base_and_adapters(self, policy: Policy) -> None:
        if not self._has_base:
            self._send_weights(policy, self._recorded(policy, policy.base_weights()))
            self._check_sent(HEAD)
            self._sent, self._has_base = {}, True
        assert policy.lora is not None
        weights = policy.lora.weights(policy.model, getattr(torch, self.dtype_for(policy)))
        self._sent = {name: checksum(weight) for name, weight in weights.items()}
        self._send_adapters(policy, weights)

    def _check_sent(self, *names: str) -> None:
        if missing := set(names) - self._sent.keys():
            raise EngineError(f"data.engine: a sync did not send {min(missing)}, so vLLM has an outdated copy of it")

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
        if self._unprobed:
            self._check_change(prompts)
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

    def _recorded(self, policy: Policy, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights in vLLM's dtype; records their checksums."""
        dtype = getattr(torch, self.dtype_for(policy))
        for name, weight in weights:
            sent = weight.to(dtype)
            self._sent[name] = checksum(sent)
            yield name, sent

    @abstractmethod
    def _send_weights(self, policy: Policy, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Replaces vLLM's weights and resets its prefix cache. vLLM has no adapters afterwards.

        Args:
            policy: The policy.
            weights: The weights, under their names in a checkpoint.
        """

    @abstractmethod
    def _send_adapters(self, policy: Policy, weights: dict[str, Tensor]) -> None:
        """Replaces vLLM's adapters and resets its prefix cache.

        Args:
            policy: The policy.
            weights: The adapters, as returned by `LoRA.weights`.

        Raises:
            AdapterRefused: If vLLM cannot compute with them.
        """

    @abstractmethod
    def _sample(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[Rollout]:
        """See `generate`; the weights are not checked yet."""

    @abstractmethod
    def score(self, sequences: Sequence[tuple[list[int], list[int]]], temperature: float = 1.0) -> list[Tensor]:
        """See `ScoringEngine.score`."""

    def _probe_scores(self, sequences: Sequence[tuple[list[int], list[int]]]) -> dict[str, list[Tensor]]:
        """`score` on each server, by the server's name."""
        return {"vLLM": self.score(sequences)}

    def _check_change(self, prompts: Sequence[list[int]]) -> None:
        """Compares each server's log-probs of the first prompts of the run with the policy's, and their changes since
        earlier syncs.

        Raises:
            EngineError: If a server has outdated weights.
        """
        policy = self._policy
        assert policy is not None
        self._unprobed = False
        if self._probe is None:
            self._probe = Probe.of([prompt for prompt in prompts if room(policy, prompt, Sampling())])
        sequences, dtype = self._probe.sequences, self.dtype_for(policy)
        scores = self._probe_scores(sequences)
        own = policy_log_probs(policy, sequences, dtype, merged=not self._separate)
        for server, engine in scores.items():
            after = self._probe.measured(engine, *own)
            first, before = self._first.setdefault(server, after), self._latest.get(server)
            self._latest[server] = after
            wrong = deviating(first, after, dtype, self.tolerance)
            if before is not None:
                wrong = (skipped(before, after) if self._changed else None) or incomplete(first, after) or wrong
            if wrong is not None:
                advice = "; data.engine.lora=merged merges the adapters" if self._separate else ""
                raise EngineError(f"data.engine: after a sync {server} has outdated weights: {wrong}{advice}")

    def _check(self, rollouts: Sequence[Rollout], temperature: float) -> None:
        """Compares vLLM's log-probs with the policy's.

        Raises:
            EngineError: If they differ by more than rounding can explain.
        """
        policy = self._policy
        assert policy is not None
        self._unchecked = False
        # Even without rollouts: with sharded weights every rank must take part.
        sequences, dtype = [(r.prompt_ids, r.response_ids) for r in rollouts], self.dtype_for(policy)
        own = torch.cat([torch.empty(0), *(r.logp_sampler for r in rollouts)])
        measured = Measured(own, *policy_log_probs(policy, sequences, dtype, temperature, merged=not self._separate))
        difference = measured.difference
        if not len(difference):  # no rollouts, or all responses are empty
            return
        limit = measured.limit(dtype) if self.tolerance is None else self.tolerance
        if not float(difference.mean()) <= limit:  # also true for NaN
            raise EngineError(
                "data.engine: after a sync vLLM's log-probs differ from the policy's by "
                f"{float(difference.mean()):.3g} nats on average (maximum {float(difference.max()):.3g}), more than "
                f"data.engine.tolerance ({limit:.3g}) allows: vLLM has different weights or another precision"
            )


def head_overrides(policy: Policy) -> dict[str, Any]:
    """vLLM's `hf_overrides` for an output head in the policy's `head_dtype`. The head's weights keep vLLM's dtype and
    are converted for the matmul."""
    return {"head_dtype": policy.head_dtype} if policy.head_is_float32 else {}


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
