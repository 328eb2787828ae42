"""Low-rank adapters (peft): in the policy's model, in the teacher, and on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rlrt_lightning.policy.dither import dithered
from rlrt_lightning.policy.sharding import local, whole
from rlrt_lightning.runtime.errors import ConfigError, check_ranges, first_line

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


@dataclass
class LoRA:
    """Low-rank adapters (arXiv:2106.09685), injected into the model by peft.

    Args:
        rank: Rank of the adapters.
        alpha: The adapters' output is scaled by alpha / rank.
        dropout: Dropout probability of the adapters' input during training.
        targets: Names of the layers that get an adapter; null adapts all linear layers except the head.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        ranges = {
            "rank": (self.rank, self.rank >= 1, "at least 1"),
            "alpha": (self.alpha, 0 < self.alpha < math.inf, "above 0"),
            "dropout": (self.dropout, 0 <= self.dropout < 1, "from 0 to below 1"),
        }
        check_ranges("model.policy.lora", ranges)

    @property
    def config(self) -> LoraConfig:
        """The settings as peft's config."""
        from peft import LoraConfig

        targets: Any = self.targets or "all-linear"
        settings: Any = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout}
        return LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **settings)

    def add_to(self, model: PreTrainedModel) -> None:
        """Injects the adapters and freezes all other weights. Their initial values are the same on every rank. They are
        float32 even if the model is not: in bfloat16, an optimizer step would be rounded away.

        Raises:
            ConfigError: If the model has none of the target layers.
        """
        from peft import inject_adapter_in_model

        try:
            inject_adapter_in_model(self.config, model)
        except ValueError as error:
            raise ConfigError(f"model.policy.lora: {first_line(error)}") from error
        for adapter in _adapters(model):
            adapter.data = adapter.data.to(torch.promote_types(adapter.dtype, torch.float32))

    def weights(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The adapters' full weights on the CPU, under peft's names. Collective if the weights are sharded.

        Args:
            model: The model with the adapters.
            dtype: Data type of the result; None keeps the model's.
        """
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(model)
        full = {name: whole(tensor).detach() for name, tensor in state.items()}
        return {f"base_model.model.{name}": tensor.to("cpu", dtype=dtype).contiguous() for name, tensor in full.items()}

    def write(self, weights: dict[str, Tensor], folder: Path, base: str) -> None:
        """Writes the adapters as a folder that peft and vLLM can load on top of the base model.

        Args:
            weights: The result of `weights`.
            folder: The folder to write.
            base: Path or Hugging Face id of the base model.
        """
        from safetensors.torch import save_file

        config = self.config
        config.base_model_name_or_path = base
        config.inference_mode = True
        config.target_modules = adapted_layers(weights)
        config.save_pretrained(str(folder))
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def merged(
    model: nn.Module, dtype: torch.dtype | None, dither: bool, name: str, weight: Tensor
) -> tuple[str, Tensor] | None:
    """A tensor of a model's state dict with its adapter merged into it, and its name in a checkpoint without adapters;
    None for a tensor of an adapter.

    Args:
        model: The model.
        dtype: Data type of merged weights; None keeps the tensor's.
        dither: Whether a change by the adapter that is smaller than a rounding step of half precision is kept on
            average, see `policy.dither`; otherwise rounding removes it.
        name: The tensor's name in the state dict.
        weight: The tensor.
    """
    owner, base, kind = name.rpartition(".base_layer.")
    if base and kind == "weight":
        with torch.no_grad():
            change = whole(cast(Any, model.get_submodule(owner)).get_delta_weight("default"))
            weight, rounded = whole(weight), dtype or weight.dtype
            change = change.to(torch.promote_types(weight.dtype, torch.float32))
            if dither and rounded in (torch.bfloat16, torch.float16):
                weight = dithered(weight, rounded)
            weight = (weight + change).to(rounded)
    return without_adapter(name, weight)


def adapted_layers(names: Iterable[str]) -> list[str]:
    """The names of the layers with adapters, such as `q_proj`, from the names of a model's tensors."""
    layers = (name.rpartition(".lora_A.")[0] for name in names)
    return sorted({layer.rpartition(".")[2] for layer in layers if layer})


def unusual_target(model: PreTrainedModel) -> str | None:
    """The name of a layer with an adapter that is the output head or not linear; None if there is none."""
    from peft.tuners.lora import LoraLayer

    head = model.get_output_embeddings()
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and (layer is head or not isinstance(layer.get_base_layer(), nn.Linear)):
            return name
    return None


def without_adapter(name: str, weight: Tensor) -> tuple[str, Tensor] | None:
    """A tensor of a model's state dict and its name in a checkpoint without adapters; None for a tensor of an
    adapter."""
    if ".lora_" in name:
        return None
    owner, base, kind = name.rpartition(".base_layer.")
    return (f"{owner}.{kind}" if base else name), weight


class TeacherAdapters(nn.Module):
    """The adapters of a teacher that shares all other weights with the policy.

    Args:
        model: The policy's model, whose adapters are copied.
        off: Whether the teacher is the model without adapters, as before training; nothing is copied then.
    """

    def __init__(self, model: nn.Module, off: bool) -> None:
        super().__init__()
        self.off = off
        self.copy(model)

    def copy(self, model: nn.Module) -> None:
        """Copies the model's current adapters, with the same sharding."""
        copied = [] if self.off else _adapters(model)
        self.copies = nn.ParameterList(nn.Parameter(p.detach().clone(), requires_grad=False) for p in copied)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Runs the model with these adapters instead of its own."""
        if self.off:
            _scale(model, 0.0)  # not peft's `enable_adapters`, which also changes what requires a gradient
        else:
            self._swap(model)
        try:
            yield
        finally:
            if self.off:
                _scale(model, 1.0)
            else:
                self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for ours, theirs in zip(self.copies, _adapters(model), strict=True):
            a, b = local(ours), local(theirs)
            previous = b.clone()
            b.copy_(a)
            a.copy_(previous)


def _scale(model: nn.Module, factor: float) -> None:
    """Scales the adapters' contribution; with 0 the outputs are exactly those of the model without adapters."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", factor)


def _adapters(model: nn.Module) -> list[Tensor]:
    return [p for name, p in model.named_parameters() if ".lora_" in name]
