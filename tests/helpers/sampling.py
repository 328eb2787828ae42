"""Draws rollouts, and computes the logits of one rollout alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlrt_lightning import Policy, Rollout, Sampling, TransformersEngine


def draw_rollouts(
    policy: Policy, prompts: list[list[int]], n: int, sampling: Sampling, max_rows: int = 256, dtype: Any = None
) -> list[Rollout]:
    """`n` rollouts of each prompt by the transformers engine, seeded by the prompt, in order of group and index."""
    engine = TransformersEngine(max_rows, dtype)
    engine.sync(policy)
    drawn = engine.generate(prompts, n, sampling, [1000 * len(prompt) + sum(prompt) for prompt in prompts])
    return sorted(drawn, key=lambda rollout: (rollout.group, rollout.index))


def unbatched_logits(policy: Policy, rollout: Rollout) -> Tensor:
    """The logits that predict each token of a response, from a separate forward pass, [T, V]."""
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    with policy.evaluating() as model:
        return model(input_ids=ids, use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1].float()
