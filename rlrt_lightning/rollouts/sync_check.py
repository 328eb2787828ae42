"""The check that an engine has the policy's weights: log-probs of both on the same tokens, compared with the rounding
of half precision on these tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from rlrt_lightning.runtime.precision import Dtype

if TYPE_CHECKING:
    from rlrt_lightning.policy.model import Policy

Sequences = Sequence[tuple[list[int], list[int]]]
"""Pairs of prompt and response token ids."""

FLOAT32_TOLERANCE = 1e-4
"""Largest mean |difference| in float32, in nats. It is about 1e-6; if the output head was not sent, a 1 % change of its
weights causes more than 1e-2."""

ROUNDINGS = 4.0
"""Largest mean |difference| in half precision, in units of the policy's own rounding on the same tokens."""

LEAST_ROUNDING = 0.005
"""Nats; where the policy's own rounding happens to be smaller, as on tokens that are nearly certain."""

UNKNOWN_ROUNDING = 0.04
"""Nats; assumed where the policy cannot be computed in float32."""

MOST_ERRORS = 6.0
"""Standard errors by which the change of an engine's log-probs may fall short of the policy's."""

PROBE_PROMPTS, PROBE_TOKENS = 16, 256
"""Largest number of prompts whose log-probs are compared from sync to sync, and of tokens of each."""


@dataclass(frozen=True)
class Measured:
    """Log-probs of the same N tokens, nats, float32 [N] each.

    Args:
        engine: By the engine.
        rounded: By the policy in the engine's type.
        exact: By the policy in float32; None if it cannot be computed in float32.
    """

    engine: Tensor
    rounded: Tensor
    exact: Tensor | None

    @property
    def difference(self) -> Tensor:
        """|difference| between engine and policy, [N]."""
        return (self.engine - (self.rounded if self.exact is None else self.exact)).abs()

    def limit(self, dtype: Dtype) -> float:
        """Largest mean |difference| that rounding explains.

        Args:
            dtype: The engine's type.
        """
        if dtype == "float32":
            return FLOAT32_TOLERANCE
        if self.exact is None:
            return ROUNDINGS * UNKNOWN_ROUNDING
        return ROUNDINGS * max(float((self.rounded - self.exact).abs().mean()), LEAST_ROUNDING)


def policy_log_probs(
    policy: Policy, sequences: Sequences, dtype: Dtype, temperature: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """The policy's log-probs of some responses in an engine's type and in float32 (see `Measured`), [N] each. If the
    weights are sharded, all ranks must call it."""

    def score(computed_in: Dtype) -> Tensor:
        half = computed_in != "float32"
        with torch.autocast(policy.device.type, dtype=getattr(torch, computed_in) if half else None, enabled=half):
            return torch.cat([torch.empty(0), *policy.score(sequences, temperature)])

    rounded = score(dtype)
    if dtype == "float32":
        return rounded, rounded
    # Shards in half precision are fetched in that type, and weights in half precision have no float32 computation.
    cannot = policy.dtype != "float32" or isinstance(policy.model, FSDPModule)
    return rounded, None if cannot else score("float32")


@dataclass(frozen=True)
class Probe:
    """Tokens whose log-probs are compared from sync to sync.

    Args:
        sequences: The first token of each prompt and the rest of it.
        chosen: Whether each token of the rests counts, bool [N]; shared beginnings count once.
    """

    sequences: list[tuple[list[int], list[int]]] = field(default_factory=list)
    chosen: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    @classmethod
    def of(cls, prompts: Sequence[list[int]]) -> Probe:
        """Takes the first prompts, without repetitions."""
        distinct = list(dict.fromkeys(tuple(prompt[:PROBE_TOKENS]) for prompt in prompts if len(prompt) > 1))
        seen: set[int] = set()
        chosen: list[bool] = []
        for prompt in distinct[:PROBE_PROMPTS]:
            beginning = hash(prompt[:1])
            for token in prompt[1:]:
                beginning = hash((beginning, token))
                chosen.append(beginning not in seen)
                seen.add(beginning)
        sequences = [(list(prompt[:1]), list(prompt[1:])) for prompt in distinct[:PROBE_PROMPTS]]
        return cls(sequences, torch.tensor(chosen, dtype=torch.bool))

    def measure(self, policy: Policy, dtype: Dtype, engine: Sequence[Tensor]) -> Measured:
        """Compares the policy with an engine's log-probs of `sequences`. See `policy_log_probs`."""
        rounded, exact = policy_log_probs(policy, self.sequences, dtype)
        chosen = self.chosen
        own = torch.cat([torch.empty(0), *engine])[chosen]
        return Measured(own, rounded[chosen], None if exact is None else exact[chosen])


def stale(before: Measured, after: Measured) -> str | None:
    """What two measurements of the same tokens, each after a sync, say of the weights that the second one sent.

    A skipped sync leaves the engine's log-probs as they were, while the policy's change in the engine's type, be it
    only by other rounding. If only a part of the weights arrived, the engine's log-probs change by too little in the
    direction in which the policy's changed in float32: with a slope s below 1, where rounding is noise.

    Args:
        before: After the sync before.
        after: After this sync.

    Returns:
        What is wrong with the engine's weights, or None.
    """
    engine, rounded = after.engine - before.engine, after.rounded - before.rounded
    if not len(engine) or _rms(rounded) < 1e-5:  # the weights are the same in the engine's type
        return None
    if _rms(engine) < 0.2 * _rms(rounded):
        return f"its log-probs changed by {_rms(engine):.2g} nats where the policy's changed by {_rms(rounded):.2g}"
    if before.exact is None or after.exact is None:
        return None
    exact = after.exact - before.exact
    slope = float(engine @ exact / (exact @ exact))
    # Robust to tokens of different noise (White); never below that of the policy's own rounding.
    noise = torch.maximum((engine - slope * exact).abs(), (rounded - exact).abs())
    error = float((exact * noise).norm() / (exact @ exact))
    if 1 - slope > max(MOST_ERRORS * error, 0.1):
        return f"its log-probs changed by {slope:.2f} (+- {error:.2f}) of what the policy's changed by"
    return None


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
