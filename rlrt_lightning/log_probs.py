"""Log-probs and entropies from logits, with a backward pass that needs no more memory than the logits' own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def token_log_probs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of tokens [C] and the entropies of their distributions, nats, [C] each, from logits [C, V]."""
    logp, entropy = log_probs_at(logits, targets[:, None])
    return logp[:, 0], entropy


def log_probs_at(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of several tokens [C, k] at each of C positions, and the entropy of each position's distribution [C],
    nats, from logits [C, V]. Gradient flows through both."""
    logp, entropy = _LogProbs.apply(logits, tokens.long())
    return logp, entropy


class _LogProbs(torch.autograd.Function):
    """With p = softmax(z): d log p_t / d z_j = [j = t] - p_j, and d H / d z_j = -p_j (log p_j + H).

    Autograd would keep four tensors of the logits' size, and make as many again for their gradients.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        total = logits.logsumexp(-1, keepdim=True)
        # exp(z - total) z is 0 where z is -inf, of a token that cannot be.
        product = (logits - total).exp_().mul_(logits)
        entropy = total[:, 0] - product.nan_to_num_(nan=0.0, neginf=float("-inf"), posinf=float("inf")).sum(-1)
        ctx.save_for_backward(logits, tokens, total, entropy)
        ctx.set_materialize_grads(False)
        return logits.gather(-1, tokens) - total, entropy

    @staticmethod
    def backward(ctx: Any, to_logp: Tensor | None, to_entropy: Tensor | None) -> Any:
        logits, tokens, total, entropy = ctx.saved_tensors
        logp = logits - total
        gradient = logp.exp()
        if to_logp is None:
            to_logp = torch.zeros(tokens.shape, dtype=logits.dtype, device=logits.device)
        if to_entropy is None:
            gradient.mul_(-to_logp.sum(-1, keepdim=True))
        else:
            inner = logp.clamp_(min=torch.finfo(logp.dtype).min).add_(entropy[:, None]).mul_(to_entropy[:, None])
            gradient.mul_(inner.add_(to_logp.sum(-1, keepdim=True)).neg_())
        return gradient.scatter_add_(-1, tokens, to_logp), None
