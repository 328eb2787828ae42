"""The policy: the model, its tokenizer, and every forward pass."""

from rlrt_lightning.policy.model import EMBEDDED, Policy

__all__ = ["EMBEDDED", "Policy"]
