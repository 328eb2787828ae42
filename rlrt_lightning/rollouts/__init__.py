"""Roll-outs: responses of the policy, with the log-probs that they were drawn with."""

from rlrt_lightning.rollouts.base import Rollout, RolloutEngine, Sampling
from rlrt_lightning.rollouts.transformers import TransformersEngine

__all__ = ["Rollout", "RolloutEngine", "Sampling", "TransformersEngine"]
