"""The part of a model's forward after its decoder: from states to logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def logits_from_states(model: PreTrainedModel, states: Tensor, in_float32: bool) -> Tensor:
    """Logits [..., V]: the head, and the scaling that some architectures add.

    Args:
        model: The model.
        states: The states of its decoder, [..., H].
        in_float32: See `apply_head`.
    """
    logits = apply_head(model.get_output_embeddings(), states, in_float32)
    config = model.config.get_text_config()
    if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / scaling
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits


def apply_head(head: nn.Module, states: Tensor, in_float32: bool) -> Tensor:
    """Logits [..., V] of states [..., H], before any scaling.

    Args:
        head: The linear layer, possibly with adapters.
        states: The decoder's states.
        in_float32: Whether to convert states and weights to float32 and compute without autocast. Float64 is kept.
    """
    if not in_float32 or states.dtype == torch.float64:
        return head(states)
    with torch.autocast(states.device.type, enabled=False):
        weights = {name: weight.float() for name, weight in head.named_parameters()}
        return functional_call(head, weights, (states.float(),))


@contextmanager
def head_in_float32(model: PreTrainedModel, enabled: bool) -> Iterator[None]:
    """Replaces the output of the model's own head by `apply_head` in float32, in the first forward pass inside."""
    head = model.get_output_embeddings() if enabled else None
    if head is None:
        yield
        return

    def replace(head: nn.Module, inputs: Any, _: Tensor) -> Tensor:
        hook.remove()  # `apply_head` calls the head too
        return apply_head(head, inputs[0], in_float32=True)

    hook = head.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()
