"""Rollouts, and the interface of the engines that generate them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from rlrt_lightning.runtime.errors import ConfigError, check_ranges
from rlrt_lightning.runtime.precision import Dtype
from rlrt_lightning.tasks.base import Verdict

if TYPE_CHECKING:
    from rlrt_lightning.policy.model import Policy


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled from the policy.

    Args:
        max_new_tokens: Maximum length of a response, in tokens. A response that reaches it without an end token or
            stop string counts as truncated.
        temperature: Divides the logits; 0 is greedy decoding (for evaluation only).
        top_p: Keep the most likely tokens whose probabilities sum to this value; 1 keeps all.
        top_k: Keep the k most likely tokens; 0 keeps all.
        min_p: Drop tokens whose probability is below this fraction of the most likely token's; 0 keeps all.
        stop: Strings that end a response. The tokens that complete a stop string stay in the response. A stop string
            that is a special token acts as an end token; others are searched for in the response's text, which
            includes special tokens.
    """

    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: list[str] = field(default_factory=list)

    @property
    def cuts(self) -> bool:
        """Whether top-p, top-k or min-p truncates the distribution."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            "top_p": (self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k, self.top_k >= 0, "0 or more"),
            "min_p": (self.min_p, 0 <= self.min_p < 1, "from 0 to below 1"),
        }
        check_ranges("sampling", ranges)
        if isinstance(self.stop, str) or not all(isinstance(stop, str) for stop in self.stop):
            raise ConfigError(f"sampling.stop is {self.stop!r}; it has to be a list of strings")
        for stop in self.stop:
            if not stop or "�" in stop:  # an incomplete multi-byte character decodes to U+FFFD
                raise ConfigError(f"sampling.stop has {stop!r}, which would match anywhere; remove it")


@dataclass(frozen=True)
class Stops:
    """The tokens and strings that end a response, for every engine.

    Args:
        ids: The model's end tokens, and stop strings that are special tokens. They stay in the response.
        strings: The other stop strings. A response ends with the token that completes one of them in the response's
            text (`Policy.decode` with `keep_special`), which excludes the prompt and includes special tokens.
    """

    ids: list[int]
    strings: list[str]

    @classmethod
    def of(cls, policy: Policy, sampling: Sampling, where: str = "data.sampling") -> Stops:
        """Builds the stops for a policy.

        Args:
            policy: Provides the end tokens and the tokenizer.
            sampling: Provides the stop strings.
            where: Name of the setting that holds `sampling`, for error messages.

        Raises:
            ConfigError: If a stop string can never be generated.
        """
        special = [policy.special_tokens[stop] for stop in sampling.stop if stop in policy.special_tokens]
        policy.check_embedded(special, f"{where}.stop tokens")
        strings = [stop for stop in sampling.stop if stop not in policy.special_tokens]
        for stop in strings:
            decoded = policy.read_back(stop)
            if stop not in decoded:
                raise ConfigError(
                    f"{where}.stop: {stop!r} can never end a response, because the model's tokenizer decodes it to "
                    f"{decoded!r}; remove it, or use a string that the tokenizer can reproduce"
                )
        return cls(sorted({*policy.end_tokens, *special}), strings)


def room(policy: Policy, prompt: Sequence[int], sampling: Sampling) -> int:
    """Maximum number of response tokens for a prompt, independent of other prompts; 0 if the prompt fills all of the
    model's positions."""
    positions = policy.max_positions
    left = sampling.max_new_tokens if positions is None else positions - len(prompt)
    return max(0, min(sampling.max_new_tokens, left))


@dataclass
class Rollout:
    """One response of the policy to one prompt.

    Args:
        group: Index of the prompt in the requested batch; shared by the K rollouts of a prompt.
        index: Index of this rollout in its group, 0 to K-1.
        prompt_ids: Prompt tokens, [P].
        response_ids: Response tokens exactly as sampled, including the end token, [T]. An empty response counts in
            its group's rewards and has no gradient.
        logp_sampler: Log-probability (nats) of each response token under the engine, at the sampling temperature,
            float32 [T]. Before truncation by top-p, top-k and min-p, unless the engine sets `cuts_before_logp`.
        entropy: Entropy (nats) of the same distributions, float32 [T]; None if the engine does not provide it:
            `rollout/entropy` is then estimated from `logp_sampler`.
        truncated: True if the response reached `max_new_tokens` or the model's last position. This includes the empty
            response to a prompt that fills all positions.
        text: The response decoded by `Policy.decode`: without end tokens, padding and chat tokens.
        verdict: The verifier's verdict; None until the response is judged.
        logp_policy: Log-probability of the same tokens under the trainer's forward pass, float32 [T]; None until the
            rollout is rescored (`data.rescore`).
        logp_reference: Log-probability of the same tokens under the reference, float32 [T]; None until the reference
            has scored the rollout (`model.reference_kl`).
    """

    group: int
    index: int
    prompt_ids: list[int]
    response_ids: list[int]
    logp_sampler: Tensor
    truncated: bool
    text: str
    entropy: Tensor | None = None
    verdict: Verdict | None = None
    logp_policy: Tensor | None = None
    logp_reference: Tensor | None = None

    @property
    def logp(self) -> Tensor:
        """Shorthand for `logp_sampler`, for scripts that use no other log-probs."""
        return self.logp_sampler


@runtime_checkable
class ScoringEngine(Protocol):
    """An engine that can also score given responses. It may need one free position in the model after each response."""

    def score(self, sequences: Sequence[tuple[list[int], list[int]]], temperature: float = 1.0) -> list[Tensor]:
        """Log-probs of given responses, as returned by `Policy.score`.

        Args:
            sequences: Pairs of prompt and response token ids.
            temperature: Divides the logits.
        """


class RolloutEngine(ABC):
    """Generates rollouts from the policy. Subclasses hold only settings until `sync` loads the weights."""

    cuts_before_logp: bool = False
    """Whether `logp_sampler` is computed after truncation by top-p, top-k and min-p, unlike the policy's log-probs."""

    beside_training: bool = False
    """Whether it samples with its own weights on its own devices, so that the policy can train meanwhile
    (`data.ahead`)."""

    half: Dtype | None = None
    """The half precision that the trainer computes in, set by the data module; None if it computes in the weights'
    dtype."""

    @property
    def ready(self) -> bool:
        """Whether it has weights to sample from."""
        return True

    @abstractmethod
    def sync(self, policy: Policy) -> None:
        """Loads the policy's current weights. Called before rollouts if they have changed or the engine is not
        `ready`."""

    def release(self) -> None:  # noqa: B027 (most engines have nothing to free)
        """Frees the memory that is not needed until the next rollouts."""

    def close(self) -> None:  # noqa: B027
        """Shuts down what the engine has started; `sync` starts it again."""

    def device_bytes(self, policy: Policy, available: int | None) -> tuple[float, float]:
        """Estimates the memory that it takes on the policy's device, besides the policy's own weights and a key-value
        cache that grows with the rollouts.

        Args:
            policy: The policy, with its weights.
            available: Bytes of memory of the device; None if unknown.

        Returns:
            Bytes while it generates, and bytes while the policy is trained.
        """
        return 0.0, 0.0

    @abstractmethod
    def generate(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[Rollout]:
        """Yields `n` rollouts for each prompt, in the order in which they finish.

        Args:
            prompts: Token ids of each prompt.
            n: Rollouts for each prompt.
            sampling: How tokens are sampled.
            seeds: A seed for each prompt. With the same weights, a seed gives the same rollouts regardless of the
                other prompts in the call.
        """


def empty_rollouts(policy: Policy, prompts: Sequence[list[int]], n: int, sampling: Sampling) -> Iterator[Rollout]:
    """Yields n empty, truncated rollouts for each prompt that leaves no room for a response."""
    for group, prompt in enumerate(prompts):
        if not room(policy, prompt, sampling):
            for index in range(n):
                empty = torch.zeros(0)
                yield Rollout(group, index, prompt, [], empty, truncated=True, text="", entropy=empty)
