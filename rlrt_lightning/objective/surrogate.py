"""The losses: surrogates of token advantages, distillation, and the KL divergence to a reference."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rlrt_lightning.objective.ratios import bounded_ratio, kl_estimate, log_ratio, widened

Aggregation = Literal["token-mean", "seq-mean-token-mean", "constant-length"]
Importance = Literal["token", "sequence", "off"]
Ratio = Literal["token", "sequence"]


class Surrogate(NamedTuple):
    """What `clipped_surrogate` and `cispo_surrogate` return.

    Args:
        loss: The loss to minimize, a scalar.
        clip_fraction: Fraction of response tokens that are clipped, a scalar: `clipped_surrogate` removes their
            gradient, `cispo_surrogate` bounds their weight.
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
    ratio: Ratio = "token",
    length: int | None = None,
) -> Surrogate:
    """-mean min(rho A_t, clip(rho, 1 - clip_low, 1 + clip_high) A_t) with rho = P_new / P_old (PPO's surrogate,
    arXiv:1707.06347, with DAPO's asymmetric clip and token mean, arXiv:2503.14476).

    With ratio "sequence", rho is the geometric mean of the rollout's token ratios (GSPO, arXiv:2507.18071, in its token
    form): all tokens of a rollout have the same value of rho, and each has the gradient of its own log-prob, so
    that token advantages keep their effect.

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
        aggregation: See `token_mean`.
        importance: `importance_weights` if a separate engine sampled the rollouts, [N, T]; None for 1.
        ratio: "token": a ratio for each token; "sequence": one for each rollout.
        length: See `token_mean`.

    Raises:
        ValueError: If a setting is out of range.
    """
    _check_choice("ratio", ratio, Ratio)
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip is {dual_clip}; it has to be above 1, or None")
    mask = mask.bool()
    advantages = token_advantages.detach()
    log_rho = log_ratio(logp_new, logp_old.detach(), mask)
    rho = bounded_ratio(log_rho if ratio == "token" else _sequence_log_ratio(log_rho, mask))
    free, bounded = rho * advantages, rho.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(free, bounded)
    cut = bounded < free
    if dual_clip is not None:
        floor = dual_clip * advantages
        objective = torch.where((advantages < 0) & (objective < floor), floor, objective)
    if importance is not None:
        objective = objective * importance.detach()
    objective = torch.where(mask, objective, 0.0)
    return Surrogate(-token_mean(objective, mask, aggregation, length), _fraction(cut, mask, objective.dtype))


def cispo_surrogate(
    logp_new: Tensor,
    logp_old: Tensor,
    token_advantages: Tensor,
    mask: Tensor,
    clip_high: float = 0.28,
    aggregation: Aggregation = "token-mean",
    importance: Tensor | None = None,
    length: int | None = None,
) -> Surrogate:
    """-mean sg(min(rho, 1 + clip_high)) A_t log P_new with rho = P_new / P_old (CISPO, arXiv:2506.13585, without a
    lower bound): the clip bounds a token's weight, and no token loses its gradient.

    Args:
        logp_new: Log-probs under the policy being trained, nats, [N, T]; the only input with a gradient.
        logp_old: Log-probs under the policy that generated the rollouts, nats, [N, T].
        token_advantages: A_t, [N, T].
        mask: True at response tokens, [N, T].
        clip_high: rho is bounded above at 1 + clip_high.
        aggregation: See `token_mean`.
        importance: As in `clipped_surrogate`.
        length: See `token_mean`.

    Raises:
        ValueError: If a setting is out of range.
    """
    mask = mask.bool()
    rho = bounded_ratio(log_ratio(logp_new, logp_old, mask).detach())
    weight = rho.clamp(max=1 + clip_high) * token_advantages.detach()
    if importance is not None:
        weight = weight * importance.detach()
    objective = torch.where(mask, weight * log_ratio(logp_new, torch.zeros_like(logp_new), mask), 0.0)
    cut = rho > 1 + clip_high
    return Surrogate(-token_mean(objective, mask, aggregation, length), _fraction(cut, mask, objective.dtype))


def reference_kl(
    logp_new: Tensor,
    logp_ref: Tensor,
    mask: Tensor,
    aggregation: Aggregation = "token-mean",
    importance: Tensor | None = None,
    length: int | None = None,
) -> Tensor:
    """Mean of r - 1 - log r with r = P_ref / P_new: an estimate of KL(P_new || P_ref), never negative ("k3",
    http://joschu.net/blog/kl-approx.html, as in GRPO, arXiv:2402.03300). log r is bounded to +-20 nats.

    Args:
        logp_new: Log-probs under the policy being trained, nats, [N, T]; the only input with a gradient.
        logp_ref: Log-probs under the reference, nats, [N, T].
        mask: True at response tokens, [N, T].
        aggregation: See `token_mean`.
        importance: As in `clipped_surrogate`.
        length: See `token_mean`.

    Returns:
        Nats, a scalar.
    """
    mask = mask.bool()
    kl = kl_estimate(log_ratio(logp_ref.detach(), logp_new, mask))
    if importance is not None:
        kl = kl * importance.detach()
    return token_mean(torch.where(mask, kl, 0.0), mask, aggregation, length)


def _sequence_log_ratio(log_rho: Tensor, mask: Tensor) -> Tensor:
    """The mean over each rollout's tokens, at each token with the gradient of the token's own value, [N, T]."""
    mean = log_rho.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(mask, mean.detach() + (log_rho - log_rho.detach()), 0.0)


def _fraction(tokens: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Fraction of the mask's tokens that are among the given ones; 0 without tokens."""
    return (tokens & mask).sum() / mask.sum().to(dtype).clamp(min=1)


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
    _check_choice("level", level, Importance)
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
    length: int | None = None,
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
        aggregation: See `token_mean`.
        importance: As in `clipped_surrogate`. It multiplies P_new / P_old: that ratio corrects for the policy's
            updates, this weight for the sampler.
        length: See `token_mean`.
    """
    mask = mask.bool()
    weights = weights * bounded_ratio(log_ratio(logp_new, logp_old, mask)).clamp(max=importance_cap)
    if importance is not None:
        weights = weights * importance
    return token_mean(torch.where(mask, weights.detach() * divergence, 0.0), mask, aggregation, length)


def token_mean(
    values: Tensor, mask: Tensor, aggregation: Aggregation = "token-mean", length: int | None = None
) -> Tensor:
    """Mean of token losses; half precision becomes float32.

    Args:
        values: Losses of the tokens, 0 outside the mask, [N, T].
        mask: True at response tokens, [N, T].
        aggregation: "token-mean" weights all tokens equally (DAPO); "seq-mean-token-mean" averages within each rollout
            first (GRPO, arXiv:2402.03300); "constant-length" divides the sum by N * `length` (Dr. GRPO,
            arXiv:2503.20783), so that a token's weight does not depend on the length of any rollout.
        length: Number of tokens that "constant-length" divides by, usually the longest response allowed; unused
            otherwise.

    Returns:
        A scalar, 0 without tokens.

    Raises:
        ValueError: If the aggregation is unknown, or "constant-length" has no length.
    """
    _check_choice("aggregation", aggregation, Aggregation)
    values = widened(values)
    tokens = mask.sum(-1).to(values.dtype)
    if aggregation == "token-mean":
        return values.sum() / tokens.sum().clamp(min=1)
    if aggregation == "seq-mean-token-mean":
        return (values.sum(-1) / tokens.clamp(min=1)).sum() / max(len(tokens), 1)
    if length is None or length < 1:
        raise ValueError(f"length is {length}; the aggregation constant-length needs a length of at least 1")
    return values.sum() / (max(len(tokens), 1) * length)


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} is {value!r}; it has to be one of {', '.join(get_args(choices))}")
