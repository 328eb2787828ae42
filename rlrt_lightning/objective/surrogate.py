"""The losses: the clipped surrogate of token advantages, and distillation."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rlrt_lightning.objective.ratios import bounded_ratio, log_ratio, widened

Aggregation = Literal["token-mean", "seq-mean-token-mean"]
Importance = Literal["token", "sequence", "off"]


class Surrogate(NamedTuple):
    """What `clipped_surrogate` returns.

    Args:
        loss: The loss to minimize, a scalar.
        clip_fraction: Fraction of response tokens whose gradient is removed by the clip, a scalar.
    """

    loss: Tensor
    clip_fraction: Tensor


def clipped_surrogate(
    logp_new: Tensor,
    logp_old: Tensor,
    token_advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
    aggregation: Aggregation = "token-mean",
    importance: Tensor | None = None,
) -> Surrogate:
    """-mean min(rho A_t, clip(rho, 1 - clip_low, 1 + clip_high) A_t) with rho = P_new / P_old (PPO's surrogate,
    arXiv:1707.06347, with DAPO's asymmetric clip and token mean, arXiv:2503.14476).

    log rho is bounded to +-20 nats: a token beyond the bound has no gradient, whatever the sign of its advantage.

    Args:
        logp_new: Log-probs under the policy being trained, nats, [N, T]; the only input with a gradient.
        logp_old: Log-probs under the policy that generated the rollouts, nats, [N, T].
        token_advantages: A_t, [N, T].
        mask: True at response tokens, [N, T].
        clip_low: rho is clipped below at 1 - clip_low.
        clip_high: rho is clipped above at 1 + clip_high.
        dual_clip: Bounds the loss of tokens with A_t < 0 at dual_clip * |A_t| (arXiv:1912.09729). Above 1; None for no
            bound.
        aggregation: "token-mean" weights all tokens of the batch equally; "seq-mean-token-mean" averages within each
            rollout first.
        importance: `importance_weights` if a separate engine sampled the rollouts, [N, T]; None for 1.

    Raises:
        ValueError: If a setting is out of range.
    """
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation is {aggregation!r}; it has to be one of {', '.join(get_args(Aggregation))}")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip is {dual_clip}; it has to be above 1, or None")
    mask = mask.bool()
    advantages = token_advantages.detach()
    ratio = bounded_ratio(log_ratio(logp_new, logp_old.detach(), mask))
    free, bounded = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(free, bounded)
    cut = bounded < free
    if dual_clip is not None:
        floor = dual_clip * advantages
        objective = torch.where((advantages < 0) & (objective < floor), floor, objective)
    if importance is not None:
        objective = objective * importance.detach()
    objective = torch.where(mask, objective, 0.0)

    tokens = mask.sum().to(objective.dtype).clamp(min=1)
    return Surrogate(-token_mean(objective, mask, aggregation), (cut & mask).sum() / tokens)


def two_path_surrogate(
    logp_new: Tensor,
    logp_old: Tensor,
    token_advantages: Tensor,
    mask: Tensor,
    selected: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    eta: float = 1.0,
) -> Surrogate:
    """RLCSD's loss (arXiv:2606.11709): the clipped surrogate's mean over the tokens that are not selected, plus eta
    times its mean over the selected ones. A mean without tokens is 0.

    Args:
        logp_new: See `clipped_surrogate`.
        logp_old: See `clipped_surrogate`.
        token_advantages: See `clipped_surrogate`.
        mask: True at response tokens, [N, T].
        selected: True at selected tokens, [N, T].
        clip_low: See `clipped_surrogate`.
        clip_high: See `clipped_surrogate`.
        eta: Factor of the selected tokens' mean.
    """
    mask = mask.bool()
    selected = selected.bool() & mask
    weights = path_weights(selected, int(mask.sum()), int(selected.sum()), eta, widened(logp_new).dtype)
    return clipped_surrogate(logp_new, logp_old, token_advantages, mask, clip_low, clip_high, importance=weights)


def path_weights(
    selected: Tensor, tokens: int, selected_tokens: int, eta: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Token weights with which the mean over all tokens is `two_path_surrogate`'s sum of two means.

    Args:
        selected: True at selected tokens, bool of any shape.
        tokens: Number of response tokens in the mini-batch.
        selected_tokens: Number of selected ones.
        eta: Factor of the selected tokens' mean.
        dtype: Dtype of the weights.

    Returns:
        In the shape of `selected`.
    """
    other, own = tokens / max(tokens - selected_tokens, 1), eta * tokens / max(selected_tokens, 1)
    return torch.full(selected.shape, other, dtype=dtype, device=selected.device).masked_fill(selected, own)


def importance_weights(
    logp_policy: Tensor, logp_sampler: Tensor, mask: Tensor, level: Importance = "token", cap: float = 2.0
) -> Tensor:
    """min(P_policy / P_sampler, cap): corrects for numerical differences between sampler and trainer (truncated
    importance sampling; arXiv:2605.10781 uses token level with a cap of 2).

    Args:
        logp_policy: The trainer's log-probs of the sampled tokens, with the weights that sampled them, nats, [N, T].
        logp_sampler: The sampler's log-probs of the same tokens, nats, [N, T].
        mask: True at response tokens, [N, T].
        level: "token": a ratio for each token; "sequence": the product of a rollout's token ratios, for all of its
            tokens; "off": 1.
        cap: Upper bound of the ratio.

    Returns:
        Weights [N, T], 0 outside the mask. No gradient.
    """
    if level not in get_args(Importance):
        raise ValueError(f"level is {level!r}; it has to be one of {', '.join(get_args(Importance))}")
    mask = mask.bool()
    difference = log_ratio(logp_policy, logp_sampler, mask).detach()
    if level == "off":
        difference = torch.zeros_like(difference)
    if level == "sequence":
        difference = difference.sum(-1, keepdim=True).expand_as(difference)
    return torch.where(mask, bounded_ratio(difference).clamp(max=cap), 0.0)


def distillation_loss(
    divergence: Tensor,
    logp_new: Tensor,
    logp_old: Tensor,
    weights: Tensor,
    mask: Tensor,
    importance_cap: float = 2.0,
    aggregation: Aggregation = "token-mean",
    importance: Tensor | None = None,
) -> Tensor:
    """mean of weights * min(P_new / P_old, importance_cap) * divergence: the loss of SDPO (arXiv:2601.20802) and, with
    its weights, of SRPO (arXiv:2604.02288). Gradients flow through the divergence only.

    Args:
        divergence: Divergence between student and teacher at each response token, nats, [N, T].
        logp_new: Log-probs under the policy being trained, nats, [N, T].
        logp_old: Log-probs under the policy that generated the rollouts, nats, [N, T].
        weights: Weight of each token, [N, T].
        mask: True at the response tokens included in the mean, [N, T].
        importance_cap: Upper bound of P_new / P_old.
        aggregation: As in `clipped_surrogate`.
        importance: As in `clipped_surrogate`. It multiplies P_new / P_old: that ratio corrects for the policy's
            updates, this weight for the sampler.
    """
    mask = mask.bool()
    weights = weights * bounded_ratio(log_ratio(logp_new, logp_old, mask)).clamp(max=importance_cap)
    if importance is not None:
        weights = weights * importance
    return token_mean(torch.where(mask, weights.detach() * divergence, 0.0), mask, aggregation)


def token_mean(values: Tensor, mask: Tensor, aggregation: Aggregation = "token-mean") -> Tensor:
    """Mean of token losses [N, T], which must be 0 outside the mask [N, T]: over all tokens, or within each rollout
    first. Returns a scalar, 0 without tokens; half precision becomes float32."""
    values = widened(values)
    tokens = mask.sum(-1).to(values.dtype)
    if aggregation == "token-mean":
        return values.sum() / tokens.sum().clamp(min=1)
    return (values.sum(-1) / tokens.clamp(min=1)).sum() / max(len(tokens), 1)
