"""Named random streams instead of a shared one, so runs can be resumed exactly and compared in pairs."""

from __future__ import annotations

from hashlib import blake2b

import torch


def derive_seed(*names: int | str) -> int:
    """A seed from 0 to 2^63 - 1 that depends only on the names and their order.

    With the epoch among the names, generators have no state to save: an epoch draws the same samples with or without a
    resume, and drawing more prompts does not change the sampling.
    """
    digest = blake2b("\x1f".join(map(str, names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*names: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*names))
