"""Formulas for the memory of training: weights, gradients, the optimizer's state, activations and logits."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from rlrt_lightning.policy.sharding import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FP32 = 4
"""Bytes of a float32 number."""

LOGITS_COPIES = 3
"""Tensors of a chunk's logits that exist at the same time in the backward pass: the logits, their gradient, and a
temporary tensor that is needed if the loss has an entropy or a divergence."""

LOGITS_OR_LAYER = "logits, or one layer"
"""A part of a pass with gradient checkpointing."""


def held(
    trained: float, frozen: float = 0.0, optimizer: float | None = None, buckets: bool = False
) -> dict[str, float]:
    """Bytes that a rank holds for the policy throughout training. The gradients, as large as the trained weights, exist
    during the update only.

    Args:
        trained: Bytes of the trained weights on the rank.
        frozen: Bytes of the other weights on the rank.
        optimizer: Bytes of the optimizer's state; None is twice those of the trained weights, as for Adam.
        buckets: Whether DDP has buckets for the gradients.
    """
    return {
        "weights": trained + frozen,
        "gradient buckets": trained if buckets else 0.0,
        "optimizer state": 2 * trained if optimizer is None else optimizer,
    }


def gathered(outside: float, layer: float, layers: int = 2) -> float:
    """Bytes of gathered weights under FSDP2: embeddings, head, last norm, and some decoder layers.

    Args:
        outside: Bytes of the weights outside the decoder layers.
        layer: Bytes of one decoder layer.
        layers: Number of layers that are gathered at the same time: the current one and the next, unless they stay
            gathered until the backward pass.
    """
    return outside + layers * layer


class Shape(NamedTuple):
    """Sizes of a dense transformer on which the memory of its activations depends, in numbers per token."""

    layers: int
    hidden: int
    queries: int
    """Width of the queries, all heads."""
    keys: int
    """Width of the keys, all heads; also that of the values."""
    inner: int
    """Width between the two halves of the MLP; of a mixture of experts, that of the experts of one token."""
    vocabulary: int
    normed: bool
    """Whether queries and keys are normalized."""
    pair_heads: int = 0
    """Number of heads if the attention keeps its probabilities for all pairs of tokens, otherwise 0. So do "eager" and,
    on a GPU in float32, "sdpa" with fewer key than query heads: none of torch's memory-efficient kernels computes that,
    and its fallback is eager (measured with torch 2.11)."""

    @classmethod
    def of(
        cls, model: PreTrainedModel, attention: str = "sdpa", device: str = "cpu", computed: int | None = None
    ) -> Shape:
        """Reads the sizes from a model and its config.

        Args:
            model: The model; its weights may be on the meta device.
            attention: Its attention implementation.
            device: Type of the device that computes.
            computed: Bytes of a number within the linear layers; None is that of the weights.
        """
        config = model.config.get_text_config()
        hidden, heads = config.hidden_size, config.num_attention_heads
        width = getattr(config, "head_dim", None) or hidden // heads
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        if experts := getattr(config, "num_experts_per_tok", None):
            inner = experts * (getattr(config, "moe_intermediate_size", None) or inner)
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        falls_back = device == "cuda" and (computed or model.dtype.itemsize) == FP32 and key_heads < heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=hidden,
            queries=heads * width,
            keys=key_heads * width,
            inner=inner,
            vocabulary=config.vocab_size,
            normed=any(name.endswith("q_norm") for name, _ in model.named_modules()),
            pair_heads=heads if attention == "eager" or (attention == "sdpa" and falls_back) else 0,
        )

    def layer(self, residual: int, computed: int, length: int) -> float:
        """Bytes per token that one decoder layer saves for its backward pass.

        Args:
            residual: Bytes of a number between layers.
            computed: Bytes of a number within the linear layers.
            length: Tokens of a sequence.
        """
        attention, mlp = 2 * (self.queries + self.keys), 4 * self.inner
        # Under autocast, each of five linear layers casts its input; otherwise those of a block share it.
        inputs = (2 if residual == computed else 5) * self.hidden
        # Norms keep a float32 copy of their input, and their result before it is scaled.
        norms = 2 * (FP32 + residual) * self.hidden + self.normed * (FP32 + computed) * (self.queries + self.keys)
        return computed * (attention + mlp + inputs) + norms + self.pairs(computed, length)

    def pairs(self, computed: int, length: int) -> float:
        """Bytes per token of the probabilities of one layer for all pairs of tokens: in float32, and converted.

        Args:
            computed: Bytes of a number within the linear layers.
            length: Tokens of a sequence.
        """
        return self.pair_heads * (FP32 + (computed if computed != FP32 else 0)) * length


def training_pass(
    shape: Shape,
    tokens: float,
    length: int,
    chunk: float,
    residual: int = FP32,
    computed: int = FP32,
    checkpointing: bool = False,
) -> dict[str, float]:
    """Bytes that a forward and backward pass needs at most, in parts.

    Args:
        shape: The model's sizes.
        tokens: Padded tokens of the pass.
        length: Tokens of its longest sequence.
        chunk: Number of tokens whose logits are computed at once.
        residual: Bytes of a number between layers.
        computed: Bytes of a number within the linear layers.
        checkpointing: Whether layers keep only their inputs for the backward pass.
    """
    layer, gradients = shape.layer(residual, computed, length), tokens * shape.pairs(computed, length)
    # Of each token, the last norm, and the states before and after those of the response are selected.
    outside = (FP32 + 3 * residual) * shape.hidden
    logits = FP32 * shape.vocabulary * (LOGITS_COPIES * chunk + shape.hidden)  # and the gradient of the head
    if not checkpointing:
        return {"activations": tokens * (shape.layers * layer + outside), "logits": max(logits, gradients)}
    kept = tokens * (shape.layers * residual * shape.hidden + outside)
    # Layers are computed again, one at a time, when the logits are freed.
    return {"activations": kept, LOGITS_OR_LAYER: max(logits, tokens * layer + gradients)}


def cast_weights(model: PreTrainedModel, computed: int) -> float:
    """Bytes of the copies that autocast makes of the linear layers in float32; the backward pass needs them.

    Args:
        model: The model; its head computes in float32.
        computed: Bytes of a number within the linear layers.
    """
    linear = [m for layer in decoder_layers(model) for m in layer.modules() if isinstance(m, nn.Linear)]
    cast = [m.weight.numel() for m in linear if m.weight.dtype == torch.float32]
    return computed * sum(cast) if computed < FP32 else 0.0


def device_memory(device: torch.device, processes: int) -> int | None:
    """Bytes of memory of a device: a GPU's, or on a CPU the part of the machine's memory for one of several processes.
    None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):  # not on Windows
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes
    return None
