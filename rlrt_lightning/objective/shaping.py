"""Shaping: terms that are added to the verifier's reward."""

from __future__ import annotations

import torch
from torch import Tensor


def overlong_penalty(length: int | Tensor, longest: int, buffer: int) -> Tensor:
    """The soft overlong punishment of DAPO (arXiv:2503.14476, Eq. 13): 0 up to `longest - buffer` tokens, then falling
    linearly to -1 at `longest`, and -1 above.

    Args:
        length: Tokens of a response, a number or [...].
        longest: Tokens of the longest response allowed.
        buffer: Number of tokens below `longest` from which a response is penalized, from 1 to `longest`.

    Returns:
        What is added to the reward, float64 [...].

    Raises:
        ValueError: If the buffer is out of range.
    """
    if not 1 <= buffer <= longest:
        raise ValueError(f"buffer is {buffer}; it has to be from 1 to longest ({longest})")
    over = torch.as_tensor(length, dtype=torch.float64) - (longest - buffer)
    return -(over / buffer).clamp(0, 1)
