"""Tiny random models of several architectures, to compare with their own plain forward pass."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rlrt_lightning.policy.model import Policy

END = "<|endoftext|>"
"""The end token of `byte_level_tokenizer`."""

SMALL: dict[str, Any] = {
    "vocab_size": 57,
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
MORE: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3_moe": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "phi3": {
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 16,
        },
    },
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
}
"""Sliding windows in some layers, learned positions, positions that a long row changes for the whole batch, and caches
that hold more than keys and values."""


def tiny_policy(architecture: str = "qwen3", overrides: dict[str, Any] | None = None, **settings: Any) -> Policy:
    """A policy with the embedded tokenizer and a random model.

    Args:
        architecture: Model type, a key of `ARCHITECTURES` or `MORE`.
        overrides: Further values of the model's config.
        settings: Settings of the policy.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture, **{**SMALL, **{**ARCHITECTURES, **MORE}[architecture], **(overrides or {})}
    )
    eager = {"attention": "eager"} if architecture in ("gemma2", "recurrent_gemma") else {}
    made = Policy(**{**eager, **settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=made.attention)
    with torch.no_grad():
        for p in model.parameters():  # the default initialization is too flat to reveal errors
            if p.dim() > 1:
                p.normal_(std=0.3)
    made.config = config
    made.adopt(model)
    return made


def byte_level_tokenizer(special: Sequence[str], bos: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes.

    Args:
        special: Special tokens besides the end token `END`.
        bos: The token that begins a text.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, bos_token=bos)
    tokenizer.add_tokens(list(special), special_tokens=True)
    return tokenizer


def save_byte_level_model(folder: Path, special: Sequence[str] = ("<|im_end|>",), rows: int | None = None) -> str:
    """Saves a random model with a byte-level tokenizer, and returns its path.

    Args:
        folder: The model's folder.
        special: Special tokens besides the end token.
        rows: Number of embeddings; None: one for each token.
    """
    tokenizer = byte_level_tokenizer(special)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    own = {"vocab_size": rows or len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **{**SMALL, **own})).save_pretrained(folder)
    return str(folder)


def half_checkpoint(folder: Path) -> str:
    """Saves the embedded model in bfloat16; the path."""
    source = Policy()
    source.load()
    source.model.bfloat16().save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    return str(folder)


def untied(folder: Path) -> Policy:
    """The embedded model with a head of its own, saved to a folder."""
    tied = Policy()
    tied.load()
    config = copy.deepcopy(tied.config)
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(tied.model.state_dict())
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    model.save_pretrained(folder)
    tied.tokenizer.save_pretrained(folder)
    made = Policy(path=str(folder))
    made.load()
    return made
