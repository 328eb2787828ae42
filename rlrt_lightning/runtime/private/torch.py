"""Private names of torch."""

from __future__ import annotations

INDEX_CLASSES = {("torch.serialization", "_get_layout"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
"""Private classes in the pickled index of a sharded checkpoint.

torch unpickles the index without restrictions, so we read it first with a restricted unpickler that allows these. If a
release writes other names, its sharded checkpoints are refused as if they contained code.
"""
