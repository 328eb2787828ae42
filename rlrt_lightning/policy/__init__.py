"""The policy: model, tokenizer and all forward passes."""

from rlrt_lightning.policy.model import EMBEDDED, Policy

__all__ = ["EMBEDDED", "Policy"]
