"""Log-probs and entropies from logits that are never all in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from rlrt_lightning.objective.ratios import LOG_ZERO

Compute = Callable[..., tuple[Tensor, ...]]
"""From the logits [C, V] of some tokens, and what else is known of each, to figures [C, ...] of each."""

Sums = tuple[Tensor, Tensor]


def apply_head(head: nn.Module, states: Tensor, in_float32: bool) -> Tensor:
    """Logits [..., V] of states [..., H].

    Args:
        head: The linear layer, possibly with adapters.
        states: The decoder's states.
        in_float32: Convert states and weights to float32 and compute without autocast; double precision is kept.
    """
    if not in_float32 or states.dtype == torch.float64:
        return head(states)
    with torch.autocast(states.device.type, enabled=False):
        weights = {name: weight.float() for name, weight in head.named_parameters()}
        return functional_call(head, weights, (states.float(),))


def in_chunks(
    compute: Compute, logits_of: Callable[[Tensor], Tensor], states: Tensor, size: int, *of_tokens: Tensor
) -> list[Tensor]:
    """What can be computed from the logits of R tokens, `size` tokens at a time. The logits of a chunk are dropped, and
    made again in the backward pass.

    Args:
        compute: See `Compute`.
        logits_of: Makes the logits [C, V] of states [C, H].
        states: [R, H].
        size: Tokens in a chunk.
        of_tokens: What else `compute` needs of the tokens, [R, ...] each.

    Returns:
        The tensors that `compute` returns, of all tokens, [R, ...] each.
    """

    def chunk(sums: list[Sums], states: Tensor, *of_tokens: Tensor) -> tuple[Tensor, ...]:
        with _remembered(sums):
            return compute(logits_of(states), *of_tokens)

    # At least one chunk, so that a batch without responses has results too, empty ones.
    parts = [
        checkpoint(chunk, [], *part, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else compute(logits_of(part[0]), *part[1:])
        for part in zip(*(t.split(size) for t in (states, *of_tokens)), strict=True)
    ]
    return [torch.cat(results) for results in zip(*parts, strict=True)]


_memory: ContextVar[tuple[list[Sums], Iterator[Sums]] | None] = ContextVar("memory", default=None)


@contextmanager
def _remembered(sums: list[Sums]) -> Iterator[None]:
    """The sums over the vocabulary that a chunk's first pass finds serve its second pass too."""
    token = _memory.set((sums, iter(list(sums))))
    try:
        yield
    finally:
        _memory.reset(token)


def token_log_probs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of tokens [C] and the entropies of their distributions, nats, [C] each, from logits [C, V]."""
    logp, entropy = log_probs_at(logits, targets[:, None])
    return logp[:, 0], entropy


def log_probs_at(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of several tokens [C, k] at each of C positions, and the entropy of each position's distribution [C],
    nats, from logits [C, V]. Gradient flows through both."""
    sums, known = _memory.get() or ([], iter(()))
    found = next(known, None)
    if found is None:
        found = _sums(logits.detach())
        sums.append(found)
    logp, entropy = _LogProbs.apply(logits, tokens.long(), *found)
    return logp, entropy


def _sums(logits: Tensor) -> Sums:
    """log sum exp [C, 1] and entropy [C]."""
    total = logits.logsumexp(-1, keepdim=True)
    # exp(z - total) z is 0 where z is -inf, of a token that cannot be.
    product = (logits - total).exp_().mul_(logits)
    return total, total[:, 0] - product.nan_to_num_(nan=0.0, neginf=float("-inf"), posinf=float("inf")).sum(-1)


class _LogProbs(torch.autograd.Function):
    """With p = softmax(z): d log p_t / d z_j = [j = t] - p_j, and d H / d z_j = -p_j (log p_j + H).

    Autograd would keep four tensors of the logits' size, and make as many again for their gradients.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, total: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, tokens, total, entropy)
        ctx.set_materialize_grads(False)
        return logits.gather(-1, tokens) - total, entropy.clone()

    @staticmethod
    def backward(ctx: Any, to_logp: Tensor | None, to_entropy: Tensor | None) -> Any:
        logits, tokens, total, entropy = ctx.saved_tensors
        if to_logp is None:
            to_logp = torch.zeros(tokens.shape, dtype=logits.dtype, device=logits.device)
        of_all = to_logp.sum(-1, keepdim=True)
        if to_entropy is None:
            gradient = (logits - total).exp_().mul_(-of_all)
        else:
            logp = (logits - total).clamp_(min=LOG_ZERO)
            of_entropy = to_entropy[:, None]
            gradient = logp.exp().mul_(logp.mul_(-of_entropy).sub_(of_entropy * entropy[:, None] + of_all))
        return gradient.scatter_add_(-1, tokens, to_logp), None, None, None
