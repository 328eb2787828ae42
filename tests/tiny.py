"""Random models of a few architectures, small enough to compare with their own plain forward pass."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlrt_lightning.policy import Policy

SMALL: dict[str, Any] = {
    "vocab_size": 28,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {"tie_word_embeddings": False},
    "gemma2": {"final_logit_softcapping": 3.0, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "mistral": {"sliding_window": 6},
}


def policy(architecture: str = "qwen3", **settings: Any) -> Policy:
    """The embedded tokenizer with a random model."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**SMALL, **ARCHITECTURES[architecture]})
    made = Policy(**settings)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if architecture == "gemma2" else "sdpa"
    )
    with torch.no_grad():
        for p in model.parameters():  # a default initialisation is so flat that nothing could go wrong
            if p.dim() > 1:
                p.normal_(std=0.3)
    made.config = config
    made.adopt(model)
    return made
