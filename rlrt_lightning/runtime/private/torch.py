"""Private names of torch."""

from __future__ import annotations

INDEX_CLASSES = {("torch.serialization", "_get_layout"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
"""What the pickled index of a folder of shards names beside public classes.

torch unpickles the index without restrictions, so ours is read first, with these alone allowed. Where a release writes
other names its folders of shards are refused, as if they held code.
"""
