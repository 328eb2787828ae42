"""Extreme log-probs: the effect of one token on a loss, its gradient and the weights of Eq. 6."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from rlrt_lightning.epoch.metrics import mismatch
from rlrt_lightning.objective import (
    GRPO,
    RLRT,
    RLSD,
    SDPO,
    clipped_surrogate,
    distillation_loss,
    dynamic_weights,
    importance_weights,
    token_mean,
)
from rlrt_lightning.objective.ratios import LOG_RATIO_BOUND, bounded_ratio, kl_estimate, log_ratio

FAR = [-math.inf, -1e30, -6e4, -120.0, 120.0]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
N, T = 4, 6


def in_range(far: float, dtype: torch.dtype) -> float:
    return max(far, torch.finfo(dtype).min) if math.isfinite(far) else far


def log_probs(seed: int, dtype: torch.dtype) -> Tensor:
    return (-3 * torch.rand(N, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def surrogate(new: Tensor, old: Tensor, sign: float, **settings: Any) -> tuple[Tensor, Tensor]:
    """The loss and its gradient for random advantages; the advantage of the first token is `sign`."""
    new = new.clone().requires_grad_()
    advantages = torch.randn(N, T, generator=torch.Generator().manual_seed(2)).to(new)
    advantages[0, 0] = sign
    loss = clipped_surrogate(new, old, advantages, torch.ones(N, T), **settings).loss
    loss.backward()
    assert new.grad is not None
    return loss.detach(), new.grad


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "settings", [{}, {"dual_clip": 3.0}, {"aggregation": "seq-mean-token-mean"}], ids=["plain", "dual", "by sequence"]
)
def test_an_extreme_token_keeps_the_loss_finite_and_other_gradients_unchanged(
    settings: dict[str, Any], dtype: torch.dtype, sign: float
) -> None:
    _, expected = surrogate(log_probs(0, dtype), log_probs(1, dtype), sign, **settings)
    expected[0, 0] = 0.0
    for far, side in product(FAR, (0, 1)):
        new_old = log_probs(0, dtype), log_probs(1, dtype)
        new_old[side][0, 0] = in_range(far, dtype)
        loss, gradient = surrogate(*new_old, sign, **settings)
        assert loss.isfinite(), (far, side)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert gradient.dtype == dtype
        assert torch.equal(gradient, expected), (far, side)


def test_both_log_probs_of_a_token_may_be_minus_infinity() -> None:
    new, old = log_probs(0, torch.float32), log_probs(1, torch.float32)
    new[0, 0] = old[0, 0] = -math.inf
    loss, gradient = surrogate(new, old, 1.0)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_a_nan_log_prob_makes_the_loss_nan() -> None:
    new = log_probs(0, torch.float32)
    new[0, 0] = math.nan
    assert surrogate(new, new, 1.0)[0].isnan(), "the guards must see it"


def test_ratios_within_the_bound_are_exact() -> None:
    near = torch.linspace(-LOG_RATIO_BOUND, LOG_RATIO_BOUND, 101, dtype=torch.float64)
    zero, mask = torch.zeros_like(near), torch.ones_like(near)
    assert torch.equal(bounded_ratio(log_ratio(near, zero, mask)), near.exp())
    assert torch.equal(kl_estimate(log_ratio(near, zero, mask)), near.exp() - 1 - near)
    assert bounded_ratio(torch.tensor([-500.0, 500.0])).tolist() == bounded_ratio(torch.tensor([-20.0, 20.0])).tolist()


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("dtype", DTYPES)
def test_importance_weights_and_kl_estimates_are_finite(dtype: torch.dtype, far: float) -> None:
    policy, sampler, mask = log_probs(0, dtype), log_probs(1, dtype), torch.ones(N, T)
    for changed in (policy, sampler):
        before = changed[0, 0].clone()
        changed[0, 0] = in_range(far, dtype)
        for level in ("token", "sequence"):
            weights = importance_weights(policy, sampler, mask, level, cap=2.0)
            assert weights.isfinite().all()
            assert ((weights >= 0) & (weights <= 2)).all()
        difference = log_ratio(policy, sampler, mask)
        assert kl_estimate(difference).isfinite().all()
        assert (kl_estimate(difference) >= 0).all()
        metrics = mismatch(difference.flatten(), torch.zeros(N * T))
        assert all(math.isfinite(value) for value in metrics.values())
        changed[0, 0] = before


def test_sequence_importance_is_the_product_even_of_extreme_tokens() -> None:
    policy, sampler = torch.tensor([[-30.0, -1.0]]), torch.tensor([[-1.0, -30.5]])
    weights = importance_weights(policy, sampler, torch.ones(1, 2), "sequence")
    torch.testing.assert_close(weights, torch.full((1, 2), math.exp(0.5)))


@pytest.mark.parametrize("far", FAR)
def test_distillation_caps_an_extreme_token_and_keeps_other_gradients(far: float) -> None:
    new, mask = log_probs(0, torch.float32), torch.ones(N, T)

    def gradient(old: Tensor) -> Tensor:
        gap = torch.ones(N, T, requires_grad=True)
        loss = distillation_loss(gap, new, old, torch.ones(N, T), mask)
        assert loss.isfinite()
        (found,) = torch.autograd.grad(loss, gap)
        return found * N * T

    old = log_probs(1, torch.float32)
    expected = gradient(old)
    old[0, 0] = far
    found = gradient(old)
    assert found[0, 0] == pytest.approx(2.0 if far < 0 else 0.0, abs=1e-8)
    expected[0, 0] = found[0, 0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", [RLRT(gated=False), RLSD(), RLRT(), RLSD(gated=True), GRPO(), SDPO()])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_credit_are_finite_and_bounded(dtype: torch.dtype, method: Any) -> None:
    """(P_S / P_T)^sign(A) and its inverse, on correct and wrong rollouts."""
    rewards, context, mask = torch.tensor([1.0, 0, 1, 0]), torch.ones(N), torch.ones(N, T)
    advantages = torch.tensor([1.5, -1.5, 0.5, -0.5])
    expected = method(advantages, rewards, log_probs(0, dtype), log_probs(1, dtype), mask, context)
    for far, side in product(FAR, (0, 1)):
        student_teacher = log_probs(0, dtype), log_probs(1, dtype)
        student_teacher[side][:, 0] = in_range(far, dtype)
        credit = method(advantages, rewards, *student_teacher, mask, context)
        for values in (credit.weights, credit.advantages, credit.asymmetry):
            assert values.isfinite().all(), (far, side)
        assert (credit.weights <= math.exp(LOG_RATIO_BOUND) * 1.001).all()
        assert (credit.advantages.abs() <= 2 * advantages.abs()[:, None]).all()
        for found, before in ((credit.weights, expected.weights), (credit.advantages, expected.advantages)):
            assert torch.equal(found[:, 1:], before[:, 1:])


def test_the_asymmetry_itself_is_not_bounded() -> None:
    student, teacher = torch.tensor([[-1.0]]), torch.tensor([[-120.0]])
    ones = torch.ones(1)
    credit = RLRT()(ones, ones, student, teacher, torch.ones(1, 1), ones)
    assert credit.asymmetry.tolist() == [[119.0]]
    assert credit.weights.item() == pytest.approx(math.exp(20))
    inverse = RLSD(gated=True)(ones, ones, student, teacher, torch.ones(1, 1), ones)
    assert inverse.weights.item() == pytest.approx(math.exp(-20))


def test_a_mean_over_many_bf16_tokens_is_exact() -> None:
    values = torch.ones(4, 1001, dtype=torch.bfloat16)
    for aggregation in ("token-mean", "seq-mean-token-mean"):
        assert token_mean(values, torch.ones(4, 1001), aggregation) == 1


def test_dynamic_weights_that_all_underflow_are_finite() -> None:
    weights = dynamic_weights(torch.full((2, 50), 9.0), torch.ones(2, 50), beta=100.0)
    assert weights.isfinite().all()
