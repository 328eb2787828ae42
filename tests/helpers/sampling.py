"""Sampled rollouts, and what a forward pass of one rollout alone says."""

from __future__ import annotations

import torch
from torch import Tensor

from rlrt_lightning import Policy, Rollout, Sampling, TransformersEngine


def draw(made: Policy, prompts: list[list[int]], n: int, sampling: Sampling, max_rows: int = 256) -> list[Rollout]:
    engine = TransformersEngine(max_rows)
    engine.sync(made)
    drawn = engine.generate(prompts, n, sampling, [1000 * len(prompt) + sum(prompt) for prompt in prompts])
    return sorted(drawn, key=lambda rollout: (rollout.group, rollout.index))


def logits_alone(made: Policy, rollout: Rollout) -> Tensor:
    """What predicts each token of a response, from a forward pass of its own, [T, V]."""
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    with made.evaluating() as model:
        return model(input_ids=ids, use_cache=False).logits[0, len(rollout.prompt_ids) - 1 : -1].float()
