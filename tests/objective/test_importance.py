"""The correction for the sampler's mismatch weights everything that a token adds to the loss, for every method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlrt_lightning.epoch.batch import MicroBatch, micro_batches
from rlrt_lightning.epoch.record import EpochRecord
from rlrt_lightning.module import RLRTModule
from rlrt_lightning.objective import (
    DIVER,
    GRPO,
    RLRT,
    RLSD,
    SDPO,
    SRPO,
    EntropyBonus,
    Method,
    clipped_surrogate,
    distillation_loss,
    group_advantages,
    importance_weights,
)
from rlrt_lightning.policy.padding import pad_rows
from rlrt_lightning.teacher import Teacher
from tests.helpers.epochs import random_epoch_record, with_srpo_credit
from tests.helpers.tiny import tiny_policy

METHODS: list[Method] = [
    GRPO(),
    RLRT(),
    RLSD(),
    SDPO(top_k=4),
    SRPO(top_k=4),
    EntropyBonus(coef=0.5),
    DIVER(scale=0.5),
]


@pytest.fixture(scope="module")
def made() -> Any:
    return tiny_policy()


def batch_of(method: Method, made: Any) -> MicroBatch:
    """One micro-batch with all rollouts of an epoch that have a gradient under the method."""
    data: EpochRecord = with_srpo_credit(random_epoch_record(), k=4)
    groups = torch.tensor([r.group for r in data.rollouts])
    rewards = method.shape_rewards(data.rewards, groups, [f"a {i} b {i % 2}" for i in range(len(groups))])
    data.advantages = group_advantages(rewards, groups, method.normalize_std)
    has_context = torch.tensor([score is not None for score in data.teacher])
    if method == RLRT():
        has_context = data.rewards > 0
    signals: list[Tensor] = [data.advantages, data.rewards, data.logp_old, data.logp_teacher, data.mask, has_context]
    entropy = pad_rows([s.entropy if s else None for s in data.teacher], data.mask.shape[1])
    data.credit = method(*signals, teacher_entropy=entropy)
    (batch,) = micro_batches(data, 1, 1, "token-mean")
    sequences = batch.input_ids, batch.attention_mask, batch.response_mask
    logp, _ = made.log_probs(*sequences, blocks=batch.blocks, shared=batch.shared)
    batch.logp_old = logp.detach() + 0.1 * batch.response_mask  # so that no token is clipped
    return batch


def gradient(module: RLRTModule, batch: MicroBatch, importance: Tensor) -> Tensor:
    module.policy.zero_grad()
    batch.importance = importance * batch.response_mask
    module.training_step(batch, 0)["loss"].backward()
    return torch.cat([p.grad.flatten() for p in module.policy.parameters() if p.grad is not None]).clone()


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_doubling_a_tokens_importance_doubles_its_gradient(method: Method, aggregation: Any, made: Any) -> None:
    module = RLRTModule(made, Teacher(), method, aggregation=aggregation)
    batch = batch_of(method, made)
    ones = torch.ones_like(batch.importance)
    plain = gradient(module, batch, ones)
    assert not gradient(module, batch, 0 * ones).any(), "every term of the loss is weighted"
    acts = batch.advantages != 0
    for part in (batch.distillation, batch.entropy_bonus):
        acts = acts if part is None else acts | (part != 0)
    tokens = acts.nonzero()
    assert len(tokens) > 10
    for row, place in tokens[:: max(1, len(tokens) // 6)].tolist():
        one = torch.zeros_like(ones)
        one[row, place] = 1.0
        alone, more = gradient(module, batch, one), gradient(module, batch, ones + one)
        assert alone.any()
        torch.testing.assert_close(more - plain, alone, rtol=1e-3, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_sequence_importance_scales_the_whole_rollout(method: Method, made: Any) -> None:
    """The gradient of each rollout is scaled by the product of its tokens' ratios."""
    module = RLRTModule(made, Teacher(), method, importance="sequence")
    batch = batch_of(method, made)
    policys = batch.logp_old
    offset = torch.linspace(-0.2, 0.1, policys.shape[1])
    weights = importance_weights(policys, policys + offset, batch.response_mask, "sequence", cap=2.0)
    plain = torch.zeros_like(gradient(module, batch, torch.ones_like(weights)))
    for row in range(len(weights)):
        alone = torch.zeros_like(weights)
        alone[row] = 1.0
        factor = float(weights[row][batch.response_mask[row]][0])
        plain += factor * gradient(module, batch, alone)
    assert weights[batch.response_mask].unique().numel() > 1
    torch.testing.assert_close(gradient(module, batch, weights), plain, rtol=1e-3, atol=1e-5 * float(plain.abs().max()))


def test_an_importance_of_one_is_bit_identical_to_none() -> None:
    g = torch.Generator().manual_seed(0)
    new, old, advantages, gap, weights = torch.randn(5, 4, 9, generator=g)
    mask = torch.rand(4, 9, generator=g) < 0.7
    for importance in (None, mask.float()):
        leaves = new.clone().requires_grad_(), gap.clone().requires_grad_()
        loss = clipped_surrogate(leaves[0], old, advantages, mask, importance=importance).loss
        loss = loss + distillation_loss(leaves[1], new, old, weights, mask, importance=importance)
        found = loss.detach(), *torch.autograd.grad(loss, leaves)
        if importance is None:
            expected = found
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_the_sampler_correction_multiplies_with_sdpos_own_ratio() -> None:
    """min(P_new / P_old, 2) of the policies, times min(P_trainer / P_sampler, cap) for the sampler."""
    old, mask = torch.full((1, 3), -2.0), torch.ones(1, 3)
    new, gap = old + torch.tensor([[1.0, 0.0, -1.0]]), torch.ones(1, 3, requires_grad=True)
    correction = torch.tensor([[2.0, 0.5, 1.5]])
    loss = distillation_loss(gap, new, old, torch.ones(1, 3), mask, importance=correction)
    (found,) = torch.autograd.grad(loss, gap)
    torch.testing.assert_close(found * 3, torch.tensor([[2.0, 1.0, torch.e**-1]]) * correction)


def test_importance_off_gives_weights_of_one() -> None:
    batch = batch_of(SRPO(top_k=4), tiny_policy())
    weights = importance_weights(batch.logp_old, batch.logp_old - 9, batch.response_mask, "off")
    assert torch.equal(weights, batch.response_mask.float())


def test_may_train_selects_rollouts_by_method_advantage_and_reward() -> None:
    advantages, rewards = torch.tensor([0.0, 1.0, 0.0, -1.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    for method, expected in (
        (GRPO(), [0, 1, 0, 1]),
        (RLRT(), [0, 1, 0, 1]),
        (SDPO(), [1, 1, 1, 1]),
        (SRPO(), [0, 1, 1, 1]),
        (EntropyBonus(), [1, 1, 1, 1]),
        (replace(EntropyBonus(), coef=0.0), [0, 1, 0, 1]),
    ):
        assert method.may_train(advantages, rewards).tolist() == [bool(e) for e in expected], method
