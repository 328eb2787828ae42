"""Checks after a sync that an engine has the policy's weights.

Both compute log-probs of the same tokens, and their difference is compared with the rounding of half precision on these
tokens. `skipped`, `deviating` and `incomplete` compare two syncs; each returns what is wrong, or None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rlrt_lightning.runtime.precision import Dtype

if TYPE_CHECKING:
    from rlrt_lightning.policy.model import Policy

Sequences = Sequence[tuple[list[int], list[int]]]
"""Pairs of prompt and response token ids."""

FLOAT32_TOLERANCE = 1e-4
"""Largest mean |difference| in float32, in nats; usually it is about 1e-6."""

MAX_GROWTH, MIN_FLOAT32 = 10.0, 1e-6
"""Largest growth of the mean |difference| in float32 since the first sync, as a factor of its first value, or of
MIN_FLOAT32 nats if that is larger."""

MAX_ROUNDINGS = 4.0
"""Largest mean |difference| in half precision, as a multiple of the policy's own rounding on the same tokens."""

MIN_ROUNDING = 0.005
"""Lower bound of that rounding, in nats; it is smaller on nearly certain tokens."""

OUTLIER = 1.0
"""Difference in nats that rounding may cause at a single token; matters only with few tokens."""

DEFAULT_ROUNDING = 0.04
"""Rounding in nats that is assumed if the policy cannot be computed in float32."""

MAX_ERRORS, MIN_SHORTFALL = 6.0, 0.1
"""The change of an engine's log-probs may fall short of the policy's by this many standard errors, and always by this
fraction."""

MIN_CHANGE = 1e-4
"""Smallest change of the policy's log-probs, in nats, with which an engine's change is compared."""

MIN_CHANGED_TENSORS = 0.1
"""Fraction of the tensors that must differ between two syncs, in the engine's dtype, to expect different log-probs."""

PROBE_PROMPTS, PROBE_TOKENS = 16, 256
"""Maximum number of prompts in a `Probe`, and of tokens of each."""


@dataclass(frozen=True)
class Measured:
    """Log-probs of the same N tokens, nats, float32 [N] each.

    Args:
        engine: Computed by the engine.
        rounded: Computed by the policy in the engine's dtype.
        exact: Computed by the policy in float32, with weights rounded to the engine's dtype; None if not possible.
    """

    engine: Tensor
    rounded: Tensor
    exact: Tensor | None

    @property
    def difference(self) -> Tensor:
        """|difference| between engine and policy, [N]."""
        return (self.engine - (self.rounded if self.exact is None else self.exact)).abs()

    def limit(self, dtype: Dtype) -> float:
        """Largest mean |difference| that rounding explains, in nats.

        Args:
            dtype: The engine's dtype.
        """
        if dtype == "float32":
            return FLOAT32_TOLERANCE
        if self.exact is None:
            rounding = DEFAULT_ROUNDING
        else:
            rounding = max(float((self.rounded - self.exact).abs().mean()), MIN_ROUNDING)
        return MAX_ROUNDINGS * rounding + OUTLIER / len(self.engine)


def policy_log_probs(
    policy: Policy, sequences: Sequences, dtype: Dtype, temperature: float = 1.0, merged: bool = True
) -> tuple[Tensor, Tensor | None]:
    """`rounded` and `exact` of `Measured`. Collective if the weights are sharded.

    Args:
        policy: The policy.
        sequences: Sequences with N response tokens in total.
        dtype: The engine's dtype.
        temperature: Divides the logits.
        merged: Whether adapters are merged into the engine's weights.
    """

    def score(half: bool) -> Tensor:
        with torch.autocast(policy.device.type, dtype=getattr(torch, dtype) if half else None, enabled=half):
            return torch.cat([torch.empty(0), *policy.score(sequences, temperature)])

    rounded = score(dtype != "float32")
    if dtype == "float32":
        return rounded, rounded
    # No float32 reference: half-precision weights are not cast up, shards are gathered in half precision, and merged
    # adapters are rounded only after the sum.
    half_weights = any(weight.dtype != torch.float32 for weight in policy.model.parameters())
    if half_weights or (policy.lora is not None and merged) or isinstance(policy.model, FSDPModule):
        return rounded, None
    with weights_rounded(policy.model, getattr(torch, dtype)):
        return rounded, score(False)


@contextmanager
def weights_rounded(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Lets a float32 model compute with weights rounded to another dtype, without gradients. Weights are rounded during
    the forward of their module only, which needs no copy of the whole model.

    Args:
        model: The model, in float32.
        dtype: The dtype to round to.
    """
    kept: dict[nn.Parameter, Tensor] = {}

    def enter(module: nn.Module, _: object) -> None:
        for weight in module.parameters(recurse=False):
            kept[weight] = weight.data
            weight.data = weight.data.to(dtype).to(weight.dtype)

    def leave(module: nn.Module, *_: object) -> None:
        for weight in module.parameters(recurse=False):
            weight.data = kept.pop(weight)

    hooks = [module.register_forward_pre_hook(enter) for module in model.modules()]
    hooks += [module.register_forward_hook(leave, always_call=True) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Probe:
    """Tokens whose log-probs are compared after every sync.

    Args:
        sequences: Each prompt, split into its first token and the rest.
        chosen: Which tokens of the rests to compare, bool [N]; common beginnings are compared once.
    """

    sequences: list[tuple[list[int], list[int]]] = field(default_factory=list)
    chosen: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    @classmethod
    def of(cls, prompts: Sequence[list[int]]) -> Probe:
        """A probe of the first distinct prompts."""
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

    def measured(self, engine: Sequence[Tensor], rounded: Tensor, exact: Tensor | None) -> Measured:
        """The log-probs of the chosen tokens.

        Args:
            engine: The engine's log-probs of `sequences`.
            rounded: The first result of `policy_log_probs` for `sequences`.
            exact: The second.
        """
        chosen = self.chosen
        own = torch.cat([torch.empty(0), *engine])[chosen]
        return Measured(own, rounded[chosen], None if exact is None else exact[chosen])


def skipped(before: Measured, after: Measured) -> str | None:
    """Whether the engine still has the weights of the previous sync. Its log-probs are then unchanged, whereas the
    policy's changed, if only by different rounding.

    Args:
        before: After the previous sync.
        after: After a sync that sent different weights.
    """
    engine, policy = _rms(after.engine - before.engine), _rms(after.rounded - before.rounded)
    if engine < 0.2 * policy:
        return f"its log-probs changed by {engine:.2g} nats, while the policy's changed by {policy:.2g}"
    return None


def deviating(first: Measured, after: Measured, dtype: Dtype, tolerance: float | None = None) -> str | None:
    """Whether the engine's log-probs differ from the policy's by more than rounding explains.

    Args:
        first: After the first sync.
        after: After the same sync or a later one.
        dtype: The engine's dtype.
        tolerance: Largest mean |difference| that is always accepted, in nats.
    """
    if not len(after.engine):
        return None
    limit = after.limit(dtype)
    if tolerance is not None:
        limit = max(limit, tolerance)
    elif dtype == "float32":
        limit = min(limit, MAX_GROWTH * max(float(first.difference.mean()), MIN_FLOAT32))
    mean = float(after.difference.mean())
    if mean <= limit:  # never true for NaN
        return None
    return f"its log-probs differ from the policy's by {mean:.2g} nats on average; rounding explains {limit:.2g}"


def incomplete(first: Measured, after: Measured) -> str | None:
    """Whether the engine lacks a part of the weights, such as an output head that it never loads.

    The regression of its change since the first sync on the policy's change then has a slope below 1. Rounding is noise
    that averages out over tokens.

    Args:
        first: After the first sync.
        after: After a later sync.
    """
    if first.exact is None or after.exact is None:
        return None
    engine, exact = after.engine - first.engine, after.exact - first.exact
    rounding = (after.rounded - after.exact) - (first.rounded - first.exact)
    if _rms(exact) < MIN_CHANGE:
        return None
    slope = float(engine @ exact / (exact @ exact))
    # White's standard error, since noise differs between tokens; at least the error from the policy's own rounding.
    noise = torch.maximum((engine - slope * exact).abs(), rounding.abs())
    error = float((exact * noise).norm() / (exact @ exact))
    if 1 - slope > max(MAX_ERRORS * error, MIN_SHORTFALL):
        return f"the change of its log-probs is {slope:.2f} (+- {error:.2f}) of the policy's change"
    return None


def checksum(weight: Tensor) -> Tensor:
    """The sum of a tensor's bit patterns as integers, an int64 scalar. Nearly every change of the tensor changes it."""
    integers = {4: torch.int32, 2: torch.int16}[weight.element_size()]
    return weight.contiguous().view(integers).sum(dtype=torch.int64)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if len(values) else 0.0
