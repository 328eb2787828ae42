"""Gradients of log-probs and entropies."""

from __future__ import annotations

import math

import torch

from rlrt_lightning.policy.log_probs import log_probs_at, token_log_probs


def test_gradients_match_finite_differences() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 11, (5, 3))  # a token may occur twice
    assert torch.autograd.gradcheck(lambda z: log_probs_at(z, tokens), (logits,))
    assert torch.autograd.gradcheck(lambda z: log_probs_at(z, tokens)[0], (logits,))
    assert torch.autograd.gradcheck(lambda z: log_probs_at(z, tokens)[1], (logits,))


def test_a_token_of_probability_zero_contributes_nothing() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
    logp, entropy = token_log_probs(logits, torch.tensor([2]))
    (logp + entropy).sum().backward()
    without = torch.tensor([[0.0, 1.0]], requires_grad=True)
    expected, expected_entropy = token_log_probs(without, torch.tensor([1]))
    (expected + expected_entropy).sum().backward()
    torch.testing.assert_close((logp, entropy), (expected, expected_entropy))
    assert logits.grad is not None
    assert without.grad is not None
    torch.testing.assert_close(logits.grad[:, [0, 2]], without.grad)
    assert logits.grad[0, 1] == 0
