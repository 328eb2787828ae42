"""Rollouts, and what an engine that makes them has to do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rlrt_lightning.policy.model import Policy  # under TYPE_CHECKING the command line would parse this file 85 times
from rlrt_lightning.runtime.errors import ConfigError, check_ranges
from rlrt_lightning.tasks.base import Verdict


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn from the policy.

    Args:
        max_new_tokens: Longest response, in tokens; one that reaches it without an end counts as truncated.
        temperature: Divides the logits; 0 takes the likeliest token (for evaluation only).
        top_p: Keep the likeliest tokens that together have this probability; 1 keeps all.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        min_p: Drop tokens less likely than this share of the likeliest one; 0 keeps all.
        stop: Strings that end a response; the tokens that complete one stay in it. One that is a special token ends
            it as an end token does; others are looked for in the response's text with special tokens in it.
    """

    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: list[str] = field(default_factory=list)

    @property
    def cuts(self) -> bool:
        """Whether some tokens that are possible are not drawn."""
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
            if not stop or "�" in stop:  # what the first bytes of a longer character look like
                raise ConfigError(f"sampling.stop has {stop!r}, which would end responses anywhere; leave it out")


@dataclass(frozen=True)
class Stops:
    """What ends a response, for every engine: one of some tokens, or one of some strings.

    Args:
        ids: The model's end tokens, and stop strings that are a special token. They end a response and stay in it.
        strings: The other stop strings. A response ends with the token that completes one in its own text, the
            prompt's left out, with special tokens in it (`Policy.decode` with `keep_special`).
    """

    ids: list[int]
    strings: list[str]

    @classmethod
    def of(cls, policy: Policy, sampling: Sampling, where: str = "data.sampling") -> Stops:
        """What ends the responses of a policy.

        Args:
            policy: Whose end tokens and tokenizer they are.
            sampling: The stop strings.
            where: The setting that holds them.

        Raises:
            ConfigError: If one can never be drawn.
        """
        special = [policy.special_tokens[stop] for stop in sampling.stop if stop in policy.special_tokens]
        policy.check_embedded(special, f"{where}.stop tokens")
        strings = [stop for stop in sampling.stop if stop not in policy.special_tokens]
        for stop in strings:
            read = policy.read_back(stop)
            if stop not in read:
                raise ConfigError(
                    f"{where}.stop: {stop!r} can never end a response: the model's tokenizer has no tokens for it, and "
                    f"makes {read!r} of it; leave it out, or take a string that the tokenizer gives back"
                )
        return cls(sorted({*policy.end_tokens, *special}), strings)


def room(policy: Policy, prompt: Sequence[int], sampling: Sampling) -> int:
    """Tokens that a response to a prompt may have, whatever other prompts there are: 0 where the prompt fills all
    positions of the model."""
    positions = policy.max_positions
    left = sampling.max_new_tokens if positions is None else positions - len(prompt)
    return max(0, min(sampling.max_new_tokens, left))


@dataclass
class Rollout:
    """One response of the policy to one prompt.

    Args:
        group: Index of the prompt in the batch that was asked for; the K rollouts of a prompt share it.
        index: Which of the group's K rollouts this is, 0 to K-1.
        prompt_ids: Tokens of the prompt, [P].
        response_ids: Tokens of the response exactly as they were sampled, the end token included, [T]. With none, it
            counts in its group's rewards, and has no gradient.
        logp_sampler: Log-probability (nats) of each response token as the engine drew it, at the sampling temperature,
            float32 [T]. Before top-p, top-k and min-p cut the distribution, except where the engine `cuts_before_logp`.
        entropy: Entropy (nats) of the same distributions, float32 [T]; None where the engine does not give it.
        truncated: True where the response was cut at `max_new_tokens`, or where the model has no more positions; so
            are the empty responses to a prompt that fills all of them.
        text: The response as text, as `Policy.decode` gives it: without end tokens, padding and chat tokens.
        verdict: What the verifier said, once it has spoken.
        logp_policy: Log-probability of the same tokens by the trainer's forward pass, float32 [T]; None until the
            rollout is rescored (`data.rescore`).
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

    @property
    def logp(self) -> Tensor:
        """What the engine said of its tokens, `logp_sampler`, for scripts that look at nothing else."""
        return self.logp_sampler


@runtime_checkable
class ScoringEngine(Protocol):
    """An engine that can also say how likely given responses are. It may want room in the model for one token after
    each."""

    def score(self, sequences: Sequence[tuple[list[int], list[int]]], temperature: float = 1.0) -> list[Tensor]:
        """Log-probs of given responses after given prompts, as `Policy.score` gives them.

        Args:
            sequences: Token ids of prompt and response.
            temperature: Divides the logits.
        """


@runtime_checkable
class RolloutEngine(Protocol):
    """Draws rollouts from the policy. Implementations hold settings until `sync` gives them the weights."""

    cuts_before_logp: bool = False
    """Whether top-p, top-k and min-p change the log-probs that it gives, which the policy's own are without."""

    beside_training: bool = False
    """Whether it draws with weights and devices of its own, so that the policy can train meanwhile (`data.ahead`)."""

    @property
    def ready(self) -> bool:
        """Whether it has weights to sample from."""
        return True

    def sync(self, policy: Policy) -> None:
        """Takes the policy's current weights; called before rollouts when they have changed, or it is not `ready`."""

    def release(self) -> None:
        """Gives back the memory that it can do without until it is asked for rollouts again."""
        return None

    def close(self) -> None:
        """Ends what it has started; `sync` starts it again."""
        return None

    def generate(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[Rollout]:
        """Yields `n` rollouts for each prompt, in the order in which they finish.

        Args:
            prompts: Token ids of each prompt.
            n: Rollouts for each prompt.
            sampling: How tokens are drawn.
            seeds: A seed for each prompt: with the same weights it gives the same rollouts, whatever the other
                prompts of the call are.
        """


def without_room(policy: Policy, prompts: Sequence[list[int]], n: int, sampling: Sampling) -> Iterator[Rollout]:
    """The empty, truncated responses to those prompts that leave no room for one, n each."""
    for group, prompt in enumerate(prompts):
        if not room(policy, prompt, sampling):
            for index in range(n):
                nothing = torch.zeros(0)
                yield Rollout(group, index, prompt, [], nothing, truncated=True, text="", entropy=nothing)
