"""Divergences between student and teacher at each position, minimized by SDPO and SRPO."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlrt_lightning.objective.ratios import LOG_ZERO


def divergence(student_logits: Tensor, teacher_logits: Tensor, alpha: float, top_k: int | None = None) -> Tensor:
    """Generalized Jensen-Shannon divergence of P_S and P_T (SDPO, arXiv:2601.20802).

    (1 - alpha) KL(P_S || M) + alpha KL(P_T || M) with the mixture M = (1 - alpha) P_S + alpha P_T. At the ends, where
    this vanishes, it is KL(P_T || P_S) for alpha = 0 and KL(P_S || P_T) for alpha = 1.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V].
        alpha: From 0 to 1.
        top_k: Compare the student's k most likely tokens, and all others as one bucket; None compares all tokens.

    Returns:
        Nats, [...], in the dtype of the logits. Gradients flow through both.

    Raises:
        ValueError: If alpha or top_k is out of range.
    """
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    if top_k is None or top_k >= student.shape[-1]:
        return divergence_on_support(student, teacher, alpha, tail=False)
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it has to be at least 1, or None for all tokens")
    support = student.topk(top_k, -1).indices
    return divergence_on_support(student.gather(-1, support), teacher.gather(-1, support), alpha, tail=True)


def divergence_on_support(student: Tensor, teacher: Tensor, alpha: float, tail: bool) -> Tensor:
    """`divergence` from log-probs of k tokens.

    Args:
        student: log P_S of k tokens, nats, [..., k].
        teacher: log P_T of the same tokens, nats, [..., k].
        alpha: As in `divergence`.
        tail: Whether the vocabulary has other tokens; these are compared as one bucket.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it has to be from 0 to 1")
    if tail:
        student, teacher = (torch.cat([logp, _tail(logp)], -1) for logp in (student, teacher))
    student, teacher = student.clamp(min=LOG_ZERO), teacher.clamp(min=LOG_ZERO)
    if alpha == 0:
        return _kl(teacher, student)
    if alpha == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(student + math.log(1 - alpha), teacher + math.log(alpha))
    return (1 - alpha) * _kl(student, mixture) + alpha * _kl(teacher, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(P || Q) of log-probs [..., k]."""
    return (p.exp() * (p - q)).sum(-1)


def _tail(logp: Tensor) -> Tensor:
    """Log of the remaining probability mass, [..., 1]; clamped, because rounding can make the mass 0 or negative."""
    total = logp.logsumexp(-1, keepdim=True).clamp(max=-torch.finfo(logp.dtype).eps)
    return torch.log(-torch.expm1(total))


def dynamic_weights(
    teacher_entropy: Tensor,
    mask: Tensor,
    beta: float,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """exp(-beta H(P_T)), normalized to mean 1 over the masked tokens (SRPO, arXiv:2604.02288): tokens at which the
    teacher is uncertain get less weight.

    Args:
        teacher_entropy: H(P_T), nats, of any shape.
        mask: True at the tokens that are weighted, same shape.
        beta: Strength; 0 weights all tokens equally.
        sum_over_ranks: Sums a tensor over all ranks, so that the mean is over the tokens of all of them.

    Returns:
        Same shape and dtype, 0 outside the mask.
    """
    mask = mask.bool()
    weights = torch.where(mask, torch.exp(-beta * teacher_entropy), 0.0)
    tokens, total = sum_over_ranks(torch.stack([mask.sum().to(weights.dtype), weights.sum()]))
    # Divide first: tokens / total would overflow if all weights underflowed to 0.
    return weights / total.clamp(min=torch.finfo(weights.dtype).tiny) * tokens
