"""Group-relative advantages: how a rollout's reward compares with those of its siblings."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, groups: Tensor, normalize_std: bool = True, eps: float = 1e-6) -> Tensor:
    """A^(k) = (r^(k) - mean_group r) / (std_group r + eps), with the unbiased std (arXiv:2605.10781, Sec. 2).

    Without `normalize_std` there is no division (Dr. GRPO, arXiv:2503.20783). If all rewards of a group are equal,
    including a group of one, its advantages are exactly 0.

    Args:
        rewards: Reward of each rollout, [N], floating point.
        groups: Prompt index of each rollout, [N], integers in any order.
        normalize_std: Divide by the group's standard deviation.
        eps: Added to the standard deviation.

    Returns:
        Advantages [N], in the dtype of `rewards`.

    Raises:
        ValueError: If the shapes differ or `rewards` is not floating point.
    """
    if rewards.shape != groups.shape or rewards.dim() != 1:
        raise ValueError(f"rewards {list(rewards.shape)} and groups {list(groups.shape)} both have to be [N]")
    if not rewards.is_floating_point():
        raise ValueError(f"rewards have to be floating point, not {rewards.dtype}")
    if rewards.numel() == 0:
        return rewards.clone()
    _, member = groups.unique(return_inverse=True)
    count = torch.bincount(member).to(rewards.dtype)

    def per_group(values: Tensor) -> Tensor:
        return torch.zeros_like(count).index_add_(0, member, values)

    centered = rewards - (per_group(rewards) / count)[member]
    low = torch.full_like(count, torch.inf).scatter_reduce_(0, member, rewards, "amin")
    # Equal rewards: rounding in the mean can leave 1e-17, which the division by std + eps would amplify.
    centered = torch.where((per_group((rewards != low[member]).to(rewards.dtype)) == 0)[member], 0.0, centered)
    if not normalize_std:
        return centered
    std = (per_group(centered**2) / (count - 1).clamp(min=1)).sqrt()
    return centered / (std[member] + eps)
