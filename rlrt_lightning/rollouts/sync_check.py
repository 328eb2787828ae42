"""The check that an engine has the policy's weights: log-probs of both on the same tokens, compared with the rounding
of half precision on these tokens."""

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
"""Largest mean |difference| in float32, in nats; it is about 1e-6."""

GROWTH, LEAST_FLOAT32 = 10.0, 1e-6
"""Factor by which the mean |difference| in float32 may grow after the first sync, and the least value in nats that is
multiplied."""

ROUNDINGS = 4.0
"""Largest mean |difference| in half precision, in units of the policy's own rounding on the same tokens."""

LEAST_ROUNDING = 0.005
"""Nats; where the policy's own rounding happens to be smaller, as on tokens that are nearly certain."""

OUTLIER = 1.0
"""Difference in nats that rounding may cause at one token, which counts where there are few."""

UNKNOWN_ROUNDING = 0.04
"""Nats; assumed where the policy cannot be computed in float32."""

MOST_ERRORS, LEAST_LACK = 6.0, 0.1
"""Standard errors by which the change of an engine's log-probs may fall short of the policy's, and the share by
which it may in any case."""

LEAST_CHANGE = 1e-4
"""Change of the policy's log-probs, in nats, below which an engine's are not compared with it."""

LEAST_TENSORS = 0.1
"""Share of tensors that must differ in the engine's type for log-probs to change."""

PROBE_PROMPTS, PROBE_TOKENS = 16, 256
"""Largest number of prompts whose log-probs are compared from sync to sync, and of tokens of each."""


@dataclass(frozen=True)
class Measured:
    """Log-probs of the same N tokens, nats, float32 [N] each.

    Args:
        engine: By the engine.
        rounded: By the policy in the engine's type.
        exact: By the policy in float32, from its weights rounded to the engine's type; None if that cannot be computed.
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
            rounding = UNKNOWN_ROUNDING
        else:
            rounding = max(float((self.rounded - self.exact).abs().mean()), LEAST_ROUNDING)
        return ROUNDINGS * rounding + OUTLIER / len(self.engine)


def policy_log_probs(
    policy: Policy, sequences: Sequences, dtype: Dtype, temperature: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """`rounded` and `exact` of `Measured`, [N] each. If the weights are sharded, all ranks must call it."""

    def score(half: bool) -> Tensor:
        with torch.autocast(policy.device.type, dtype=getattr(torch, dtype) if half else None, enabled=half):
            return torch.cat([torch.empty(0), *policy.score(sequences, temperature)])

    rounded = score(dtype != "float32")
    if dtype == "float32":
        return rounded, rounded
    # Shards in half precision are fetched in that type, weights in half precision are not computed with in float32, and
    # the sum of weights and adapters is not rounded before it is sent.
    half = any(weight.dtype != torch.float32 for weight in policy.model.parameters())
    if half or policy.lora is not None or isinstance(policy.model, FSDPModule):
        return rounded, None
    with weights_rounded(policy.model, getattr(torch, dtype)):
        return rounded, score(False)


@contextmanager
def weights_rounded(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Computes with weights that are rounded to another type, one module's at a time. Without gradient.

    Args:
        model: The model, in float32.
        dtype: The type.
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


def skipped(before: Measured, after: Measured) -> str | None:
    """Whether the engine still has the weights of the sync before. Its log-probs are then as they were, while the
    policy's changed, be it only by other rounding.

    Args:
        before: After the sync before.
        after: After a sync whose weights differ in the engine's type.

    Returns:
        What is wrong with the engine's weights, or None.
    """
    engine, policy = _rms(after.engine - before.engine), _rms(after.rounded - before.rounded)
    if engine < 0.2 * policy:
        return f"its log-probs changed by {engine:.2g} nats where the policy's changed by {policy:.2g}"
    return None


def apart(first: Measured, after: Measured, dtype: Dtype) -> str | None:
    """Whether the engine's log-probs differ from the policy's by more than rounding explains.

    Args:
        first: After the first sync.
        after: After a later one.
        dtype: The engine's type.

    Returns:
        What is wrong with the engine's weights, or None.
    """
    if not len(after.engine):
        return None
    limit = after.limit(dtype)
    if dtype == "float32":
        limit = min(limit, GROWTH * max(float(first.difference.mean()), LEAST_FLOAT32))
    mean = float(after.difference.mean())
    if mean <= limit:  # never true for NaN
        return None
    return f"its log-probs differ by {mean:.2g} nats on average, where rounding explains {limit:.2g}"


def incomplete(first: Measured, after: Measured) -> str | None:
    """Whether a part of the weights has not arrived since the first sync, such as an output head that is never sent.
    The engine's log-probs have then changed by too little in the direction in which the policy's have: with a slope
    below 1. Rounding is noise, of which a hundred tokens average out much.

    Args:
        first: After the first sync.
        after: After a later one.

    Returns:
        What is wrong with the engine's weights, or None.
    """
    if first.exact is None or after.exact is None:
        return None
    engine, exact = after.engine - first.engine, after.exact - first.exact
    rounding = (after.rounded - after.exact) - (first.rounded - first.exact)
    if _rms(exact) < LEAST_CHANGE:
        return None
    slope = float(engine @ exact / (exact @ exact))
    # Robust to tokens of different noise (White), and never below the error that the policy's own rounding causes.
    noise = torch.maximum((engine - slope * exact).abs(), rounding.abs())
    error = float((exact * noise).norm() / (exact @ exact))
    if 1 - slope > max(MOST_ERRORS * error, LEAST_LACK):
        return f"its log-probs changed by {slope:.2f} (+- {error:.2f}) of what the policy's changed by"
    return None


def bits(weight: Tensor) -> Tensor:
    """The sum of a tensor's values read as integers: another one for nearly every change, int64 scalar."""
    integers = {4: torch.int32, 2: torch.int16}[weight.element_size()]
    return weight.contiguous().view(integers).sum(dtype=torch.int64)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if len(values) else 0.0
