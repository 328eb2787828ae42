"""A tiny random model with a configurable tokenizer whose tokens are bytes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from rlrt_lightning import Policy
from tests.helpers.tiny import END, byte_level_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_policy(
    folder: Path,
    template: str | None = CHATML,
    special: Sequence[str] = (),
    single: str | None = None,
    bos: str | None = None,
    positions: int = 512,
    **settings: Any,
) -> Policy:
    """Saves a model, replacing the folder, and returns a policy that reads it.

    Args:
        folder: The model's folder.
        template: The chat template.
        special: Special tokens besides those of the chat template.
        single: The tokenizer's template for plain text `$A`, as in `$A <|endoftext|>`.
        bos: The token that begins a text.
        positions: Maximum number of positions of the model.
        settings: Settings of the policy.
    """
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = byte_level_tokenizer(["<|im_start|>", "<|im_end|>", *special], bos)
    if single is not None:
        named = [(t, tokenizer.convert_tokens_to_ids(t)) for t in (END, bos) if t is not None and t in single]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=positions,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    return Policy(str(folder), **settings)


def decoded(policy: Policy, ids: Sequence[int]) -> str:
    """The text of tokens, including special tokens."""
    return policy.tokenizer.decode(list(ids), skip_special_tokens=False)
