"""Log-probs and entropies from logits that are computed in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlrt_lightning.objective.ratios import LOG_ZERO

Compute = Callable[..., tuple[Tensor, ...]]
"""A function of the logits [C, V] of C tokens, and of further inputs [C, ...], that returns tensors [C, ...]."""

Sums = tuple[Tensor, Tensor]
"""log sum exp [C, 1] and entropy [C], the sums over the vocabulary."""


def in_chunks(
    compute: Compute, logits_of: Callable[[Tensor], Tensor], states: Tensor, size: int, *token_inputs: Tensor
) -> list[Tensor]:
    """Applies `compute` to the logits of R tokens, `size` tokens at a time. The logits of a chunk are freed, and
    recomputed in the backward pass.

    Args:
        compute: See `Compute`.
        logits_of: Computes logits [C, V] from states [C, H].
        states: [R, H].
        size: Number of tokens in a chunk.
        token_inputs: Further inputs of `compute`, [R, ...] each.

    Returns:
        The outputs of `compute` for all tokens, [R, ...] each.
    """

    def chunk(sums: list[Sums], states: Tensor, *token_inputs: Tensor) -> tuple[Tensor, ...]:
        with _reusing(sums):
            return compute(logits_of(states), *token_inputs)

    # `split` yields at least one chunk, so a batch without responses gives empty results.
    parts = [
        checkpoint(chunk, [], *part, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else compute(logits_of(part[0]), *part[1:])
        for part in zip(*(t.split(size) for t in (states, *token_inputs)), strict=True)
    ]
    return [torch.cat(results) for results in zip(*parts, strict=True)]


_cached_sums: ContextVar[tuple[list[Sums], Iterator[Sums]] | None] = ContextVar("cached_sums", default=None)


@contextmanager
def _reusing(sums: list[Sums]) -> Iterator[None]:
    """Stores the vocabulary sums of a chunk's forward pass in `sums`, and reuses them when it is recomputed."""
    token = _cached_sums.set((sums, iter(list(sums))))
    try:
        yield
    finally:
        _cached_sums.reset(token)


def token_log_probs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of target tokens and entropies, nats, [C] each, from logits [C, V] and targets [C]."""
    logp, entropy = log_probs_at(logits, targets[:, None])
    return logp[:, 0], entropy


def log_probs_at(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of k tokens [C, k] at each of C positions, and the entropy of each position [C], nats, from logits
    [C, V]. Gradients flow through both."""
    sums, cached = _cached_sums.get() or ([], iter(()))
    found = next(cached, None)
    if found is None:
        found = _sums(logits.detach())
        sums.append(found)
    logp, entropy = _LogProbs.apply(logits, tokens.long(), *found)
    return logp, entropy


def _sums(logits: Tensor) -> Sums:
    total = logits.logsumexp(-1, keepdim=True)
    # The limit of exp(z - total) * z is 0 at z = -inf, the logit of an excluded token; the product itself is NaN.
    product = (logits - total).exp_().mul_(logits)
    return total, total[:, 0] - product.nan_to_num_(nan=0.0, neginf=float("-inf"), posinf=float("inf")).sum(-1)


class _LogProbs(torch.autograd.Function):
    """With p = softmax(z): d log p_t / d z_j = [j = t] - p_j, and d H / d z_j = -p_j (log p_j + H).

    Autograd would save four tensors of the logits' size, and allocate as many for their gradients.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, total: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, tokens, total, entropy)
        ctx.set_materialize_grads(False)
        return logits.gather(-1, tokens) - total, entropy.clone()

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Any:
        logits, tokens, total, entropy = ctx.saved_tensors
        if grad_logp is None:
            grad_logp = torch.zeros(tokens.shape, dtype=logits.dtype, device=logits.device)
        grad_sum = grad_logp.sum(-1, keepdim=True)
        if grad_entropy is None:
            grad = (logits - total).exp_().mul_(-grad_sum)
        else:
            logp = (logits - total).clamp_(min=LOG_ZERO)
            grad_entropy = grad_entropy[:, None]
            grad = logp.exp().mul_(logp.mul_(-grad_entropy).sub_(grad_entropy * entropy[:, None] + grad_sum))
        return grad.scatter_add_(-1, tokens, grad_logp), None, None, None
