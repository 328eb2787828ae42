"""Random streams that are named instead of shared, so that a run can be resumed, and two runs be paired, exactly."""

from __future__ import annotations

from hashlib import blake2b

import torch


def derive_seed(*names: int | str) -> int:
    """A seed, 0 to 2^63 - 1, that depends on all names and their order, and on nothing else.

    With the epoch among the names no generator has any state to save: what an epoch draws is the same whether the run
    came to it straight or by a resume, and drawing more questions does not shift the sampling.
    """
    digest = blake2b("\x1f".join(map(str, names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*names: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*names))
