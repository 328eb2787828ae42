"""Roll-outs, and what an engine that makes them has to do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from rlrt_lightning.errors import check_ranges
from rlrt_lightning.tasks.base import Verdict

if TYPE_CHECKING:
    from rlrt_lightning.policy import Policy


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn from the policy.

    Args:
        max_new_tokens: Longest response, in tokens; one that reaches it without an end counts as truncated.
        temperature: Divides the logits; 0 takes the likeliest token (for evaluation only).
        top_p: Keep the likeliest tokens that together have this probability; 1 keeps all.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        min_p: Drop tokens less likely than this share of the likeliest one; 0 keeps all.
        stop: Strings that end a response; the tokens that complete one stay in it.
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


@dataclass
class Rollout:
    """One response of the policy to one prompt.

    Args:
        group: Index of the prompt in the batch that was asked for; the K roll-outs of a prompt share it.
        index: Which of the group's K roll-outs this is, 0 to K-1.
        prompt_ids: Tokens of the prompt, [P].
        response_ids: Tokens of the response exactly as they were sampled, the end token included, [T]. With none, it
            counts in its group's rewards, and has no gradient.
        logp: Log-probability (nats) of each response token under the policy at the sampling temperature, before
            top-p, top-k and min-p cut the distribution, float32 [T].
        entropy: Entropy (nats) of the same distributions, float32 [T]; None where the engine does not give it.
        truncated: True where the response was cut at `max_new_tokens`.
        text: The response as text, special tokens removed.
        verdict: What the verifier said, once it has spoken.
        sampler_logp: What the sampler gave as `logp`, where the trainer has put its own there (`data.rescore`).
    """

    group: int
    index: int
    prompt_ids: list[int]
    response_ids: list[int]
    logp: Tensor
    truncated: bool
    text: str
    entropy: Tensor | None = None
    verdict: Verdict | None = None
    sampler_logp: Tensor | None = None


@runtime_checkable
class ScoringEngine(Protocol):
    """An engine that can also say how likely given responses are."""

    def score(self, sequences: Sequence[tuple[list[int], list[int]]], temperature: float = 1.0) -> list[Tensor]:
        """Log-probs of given responses after given prompts, as `Policy.score` gives them.

        Args:
            sequences: Token ids of prompt and response.
            temperature: Divides the logits.
        """


@runtime_checkable
class RolloutEngine(Protocol):
    """Draws roll-outs from the policy. Implementations hold settings until `sync` gives them the weights."""

    cuts_before_logp: bool = False
    """Whether top-p, top-k and min-p change the log-probs that it gives, which `Rollout.logp` does not want."""

    beside_training: bool = False
    """Whether it draws with weights and devices of its own, so that the policy can train meanwhile (`data.ahead`)."""

    @property
    def ready(self) -> bool:
        """Whether it has weights to sample from."""
        return True

    def sync(self, policy: Policy) -> None:
        """Takes the policy's current weights; called before roll-outs when they have changed, or it is not `ready`."""

    def release(self) -> None:
        """Gives back the memory that it can do without until it is asked for roll-outs again."""
        return None

    def close(self) -> None:
        """Ends what it has started; `sync` starts it again."""
        return None

    def generate(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[Rollout]:
        """Yields `n` roll-outs for each prompt, in the order in which they finish.

        Args:
            prompts: Token ids of each prompt.
            n: Roll-outs for each prompt.
            sampling: How tokens are drawn.
            seeds: A seed for each prompt: with the same weights it gives the same roll-outs, whatever the other
                prompts of the call are.
        """
