"""Estimates at the start of training how much memory it will need."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from rlrt_lightning.policy import memory
from rlrt_lightning.policy.sharding import FSDP2Strategy, decoder_layers, local
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.optimizers import state_bytes
from rlrt_lightning.runtime.precision import half_precision

from .parts import data_of

if TYPE_CHECKING:
    from rlrt_lightning.datamodule import RolloutDataModule
    from rlrt_lightning.module import RLRTModule
    from rlrt_lightning.policy.model import Policy

log = logging.getLogger(__name__)

MIN_SHARE = 0.05
"""Settings are suggested if they reduce parts that are at least this fraction of the peak."""


SMALL_SHARE = 0.25
"""Fraction of the device's memory below which the parts are not listed."""


@dataclass(frozen=True)
class Estimate:
    """Memory of one rank, in bytes.

    Args:
        held: What exists throughout training, by name.
        phases: What else exists in each phase, by phase and name.
        tokens: Padded tokens of the largest training pass.
        length: Tokens of the longest sequence.
    """

    held: dict[str, float]
    phases: dict[str, dict[str, float]]
    tokens: int
    length: int

    @property
    def peak(self) -> float:
        """The most that exists at the same time."""
        return sum(self.held.values()) + max(sum(parts.values()) for parts in self.phases.values())

    def lines(self, available: int | None) -> list[str]:
        """A table of the parts, or only the peak if the device has much more memory.

        Args:
            available: Bytes of memory of the device; None if unknown.
        """
        unit, size = ("GB", 1e9) if self.peak >= 1e9 else ("MB", 1e6)
        if available is not None and self.peak < SMALL_SHARE * available:
            most = f"{self.peak / size:,.0f} of the device's {available / size:,.0f} {unit}"
            return [f"estimated memory: {most}, at most {self.tokens:,} tokens in a training pass"]
        named = list(self.held.items())
        for phase, parts in self.phases.items():
            named += [(f"{name} ({phase})", value) for name, value in parts.items()]
        rows = [f"  {name:<42} {value / size:8.1f}" for name, value in named if value]
        end = "" if available is None else f" of the device's {available / size:.1f}"
        title = f"estimated memory in {unit}, at most {self.tokens:,} tokens in a training pass:"
        return [title, *rows, f"  {'peak':<42} {self.peak / size:8.1f}{end}"]


class MemoryEstimate(Callback):
    """Logs at the start of training how much memory each part of it takes on the first rank's device, beside the memory
    that the device has, and warns if that is not enough. See docs/strategies.md for what is included."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the estimate."""
        if not trainer.is_global_zero:
            return
        module, data = cast("RLRTModule", pl_module), data_of(trainer)
        available = memory.device_memory(module.policy.device, trainer.num_devices)
        found = estimate(trainer, module, data, available)
        for line in found.lines(available):
            rank_zero_info(line)
        if available is not None and found.peak > available:
            log.warning(
                "training may need %.1f GB, but the device has %.1f GB; what reduces it: %s",
                found.peak / 1e9,
                available / 1e9,
                ", ".join(advice(found, trainer, module)),
            )


def estimate(trainer: Any, module: RLRTModule, data: RolloutDataModule, available: int | None) -> Estimate:
    """Estimates the memory of this rank, without key-value caches, fragmentation and the CUDA context.

    Args:
        trainer: The trainer; its strategy has prepared the module.
        module: The module, with its weights.
        data: The data module.
        available: Bytes of memory of the device; None if unknown.
    """
    policy, teacher = module.policy, module.teacher
    trained = [local(p) for p in policy.parameters() if p.requires_grad]
    views = getattr(trainer.model, "gradient_as_bucket_view", None)  # an attribute of DDP
    held = memory.held(
        _bytes(trained),
        _bytes(p for p in policy.parameters() if not p.requires_grad),
        state_bytes(module.optimizer_factory, trained),
        buckets=views is not None,
    )
    gradients = 0.0 if views else _bytes(trained)  # views of the buckets take no memory of their own
    generating, training = data.engine.device_bytes(policy, available)
    copies = {"teacher": teacher, **({} if module.reference is None else {"reference": module.reference})}
    held["averaged weights"] = _bytes(_averages(trainer, policy.device))
    tokens, length = largest_pass(trainer, policy, data)
    phases = {
        "training pass": {
            "gradients": gradients,
            **_training_pass(trainer, policy, tokens, length),
            "engine": training,
        },
        "rollouts": {"engine": generating},
    }
    for name, copy in copies.items():
        weights = {f"{name}'s weights": _bytes(copy.parameters())}
        if teacher.rest_on_cpu:  # one at a time is on the device
            phases[f"scoring by the {name}"] = weights
        else:
            held |= weights
    return Estimate(held, phases, tokens, length)


def largest_pass(trainer: Any, policy: Policy, data: RolloutDataModule) -> tuple[int, int]:
    """Padded tokens of the largest possible training pass, and tokens of its sequences."""
    length = data.max_prompt_tokens + data.sampling.max_new_tokens
    length = min(length, policy.max_positions or length)
    rollouts = data.prompts_per_epoch * data.rollouts_per_prompt // (data.minibatches * trainer.world_size)
    if data.tokens_per_pass is None:
        return math.ceil(rollouts / trainer.accumulate_grad_batches) * length, length
    return max(length, min(data.tokens_per_pass, rollouts * length)), length


def _training_pass(trainer: Any, policy: Policy, tokens: int, length: int) -> dict[str, float]:
    """The parts of a training pass; empty for architectures whose config has other names."""
    model, sharded = policy.model, isinstance(trainer.strategy, FSDP2Strategy)
    half = 2 if half_precision(trainer) else None
    try:
        layers = decoder_layers(model)
        shape = memory.Shape.of(model, policy.attention, policy.device.type, half)
    except (AttributeError, ConfigError, TypeError):
        rank_zero_info("the training pass of %s is not estimated: its config has other names", type(model).__name__)
        return {}
    weight = local(next(layers[0].parameters())).itemsize
    computed = half or weight
    residual = computed if sharded else weight
    parts = memory.training_pass(
        shape, tokens, length, policy.tokens_with_logits(tokens), residual, computed, policy.gradient_checkpointing
    )
    return {**parts, **_other_copies(trainer, policy, layers, computed)}


def _other_copies(trainer: Any, policy: Policy, layers: list[nn.Module], computed: int) -> dict[str, float]:
    """Copies of weights that a training pass makes: those gathered from shards, or those that autocast converts."""
    if not isinstance(trainer.strategy, FSDP2Strategy):
        mixed = isinstance(trainer.precision_plugin, MixedPrecision)
        return {"weights in half precision": memory.cast_weights(policy.model, computed) if mixed else 0.0}
    whole = local(next(policy.model.parameters())).itemsize if policy.head_is_float32 else computed
    outside = _numbers(policy.model) - sum(map(_numbers, layers))
    count = 2 if trainer.strategy.reshard_after_forward else len(layers)
    return {"gathered weights": memory.gathered(whole * outside, computed * max(map(_numbers, layers)), count)}


def advice(found: Estimate, trainer: Any, module: RLRTModule) -> list[str]:
    """The settings that reduce the estimate, those for the largest parts first.

    Args:
        found: The estimate.
        trainer: The trainer.
        module: The module.
    """
    policy, teacher = module.policy, module.teacher
    one_rollout = found.tokens <= found.length
    passes = "a smaller data.sampling.max_new_tokens" if one_rollout else f"data.tokens_per_pass below {found.tokens}"
    candidates = [
        (passes, {"activations", memory.LOGITS_OR_LAYER}, True),
        ("model.policy.gradient_checkpointing=true", {"activations"}, not policy.gradient_checkpointing),
        ("a smaller model.policy.logits_chunk", {"logits"}, policy.logits_chunk > 1),
        ("trainer.strategy=fsdp", {*memory.held(0), "gradients"}, not isinstance(trainer.strategy, FSDP2Strategy)),
        ("model.policy.lora.rank=16", {"gradients", "optimizer state"}, policy.lora is None),
        ("model.teacher.rest_on_cpu=true", {"teacher's weights", "reference's weights"}, not teacher.rest_on_cpu),
        ("a smaller data.engine.memory or dtype", {"engine"}, True),
    ]
    sizes = dict(found.held)
    for parts in found.phases.values():
        sizes |= {name: max(size, sizes.get(name, 0.0)) for name, size in parts.items()}
    reduced = [(sum(sizes.get(name, 0.0) for name in names), text) for text, names, helps in candidates if helps]
    return [text for size, text in sorted(reduced, reverse=True) if size > MIN_SHARE * found.peak]


def _averages(trainer: Any, device: torch.device) -> list[Tensor]:
    """The weights that callbacks keep on a device, such as those of Lightning's `EMAWeightAveraging`."""
    own = {id(p) for p in trainer.lightning_module.parameters()}
    kept = (
        value for callback in trainer.callbacks for value in vars(callback).values() if isinstance(value, nn.Module)
    )
    return [p for module in kept for p in module.parameters() if id(p) not in own and p.device == device]


def _bytes(tensors: Iterable[Tensor]) -> float:
    return float(sum(local(tensor).nbytes for tensor in tensors))


def _numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
