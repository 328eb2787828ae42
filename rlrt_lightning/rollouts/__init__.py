"""Rollouts: responses sampled from the policy, with their log-probs."""

from rlrt_lightning.rollouts.base import Rollout, RolloutEngine, Sampling, ScoringEngine
from rlrt_lightning.rollouts.transformers import TransformersEngine
from rlrt_lightning.rollouts.vllm_colocate import VllmColocateEngine
from rlrt_lightning.rollouts.vllm_server import VllmServerEngine

__all__ = [
    "Rollout",
    "RolloutEngine",
    "Sampling",
    "ScoringEngine",
    "TransformersEngine",
    "VllmColocateEngine",
    "VllmServerEngine",
]
