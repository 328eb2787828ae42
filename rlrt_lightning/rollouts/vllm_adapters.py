"""Whether vLLM can compute with the policy's LoRA adapters. Needs vLLM, but not the policy's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from rlrt_lightning.runtime.precision import Dtype

if TYPE_CHECKING:
    from rlrt_lightning.policy.model import Policy

MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts as the maximum rank of its adapters."""


def adapter_settings(policy: Policy) -> dict[str, Any]:
    """vLLM's settings for the policy's adapters. They name the layers, because by default vLLM also prepares the output
    head for adapters, and then fails to compute log-probs of prompts."""
    assert policy.lora is not None
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": next(allowed for allowed in MAX_RANKS if allowed >= policy.lora.rank),
        "lora_target_modules": policy.adapted_layers(),
    }


def obstacle(policy: Policy, dtype: Dtype) -> str | None:
    """Why vLLM on this machine cannot compute with the policy's adapters; None if it can.

    Args:
        policy: The policy, with adapters.
        dtype: Type of vLLM's weights.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models import supports_lora

    assert policy.lora is not None
    if policy.lora.rank > MAX_RANKS[-1]:
        return f"model.policy.lora.rank is {policy.lora.rank}, and vLLM's maximum is {MAX_RANKS[-1]}"
    if dtype == "float32" and torch.cuda.is_available():
        return "vLLM's LoRA kernels for GPUs do not support float32"
    names = policy.config.architectures or []
    known = [ModelRegistry.models[name] for name in names if name in ModelRegistry.models]
    if not known or not supports_lora(known[0].load_model_cls()):
        return f"vLLM does not support LoRA for {', '.join(names) or policy.config.model_type}"
    return None
