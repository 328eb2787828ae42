"""Micro-batches of an epoch: however it is split, the gradient is that of the mean over the mini-batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision

from rlrt_lightning.epoch.batch import micro_batches, mini_batch_sizes
from rlrt_lightning.epoch.record import EpochRecord
from rlrt_lightning.module import RLRTModule
from rlrt_lightning.objective import GRPO, RLRT, SDPO, SRPO, clipped_surrogate
from rlrt_lightning.policy.model import Policy
from rlrt_lightning.teacher import Teacher
from tests.helpers.epochs import random_epoch_record, record_of_rank, with_srpo_credit
from tests.helpers.tiny import tiny_policy


def gradient(made: Policy, batches: list[Any], aggregation: Any, accumulate: int) -> torch.Tensor:
    """The gradient that Lightning accumulates: each loss is divided by the number of micro-batches."""
    made.zero_grad()
    for batch in batches:
        ids, attention, mask = batch.input_ids, batch.attention_mask, batch.response_mask
        logp, _ = made.log_probs(ids, attention, mask, batch.temperature, batch.blocks, batch.shared)
        loss = clipped_surrogate(logp, batch.logp_old, batch.advantages, batch.response_mask, aggregation=aggregation)
        (loss.loss * batch.share / accumulate).backward()
    return torch.cat([p.grad.flatten() for p in made.parameters()])


@pytest.mark.parametrize("share", [False, True], ids=["separate prompts", "shared prompts"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 20])
def test_any_split_into_micro_batches_gives_the_mini_batch_gradient(
    aggregation: Any, accumulate: int, share: bool
) -> None:
    made, data = tiny_policy(), random_epoch_record()
    cut = list(micro_batches(data, 2, accumulate, aggregation, sharing=made.work if share else None))
    if accumulate == 1:
        assert any(batch.shared is not None for batch in cut) == share
    assert len(cut) == 2 * accumulate
    for step in range(2):
        rows = [r for r in data.rollouts if r.group // 2 == step]
        numbers = [i for i, r in enumerate(data.rollouts) if r.group // 2 == step]
        made.zero_grad()
        losses, tokens = [], 0
        for i, r in zip(numbers, rows, strict=True):  # reference: one at a time, those without advantage too
            ids = torch.tensor([r.prompt_ids + r.response_ids])
            logp = made.model(input_ids=ids).logits[0, len(r.prompt_ids) - 1 : -1].log_softmax(-1)
            logp = logp.gather(-1, torch.tensor(r.response_ids)[:, None])[:, 0]
            n = len(r.response_ids)
            a, ratio = data.credit.advantages[i, :n], (logp - r.logp_sampler).exp()
            objective = torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
            losses.append(objective.sum() if aggregation == "token-mean" else objective.mean())
            tokens += n
        (-sum(losses) / (tokens if aggregation == "token-mean" else len(rows))).backward()
        expected = torch.cat([p.grad.flatten() for p in made.parameters()]).clone()
        got = gradient(made, cut[step * accumulate : (step + 1) * accumulate], aggregation, accumulate)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def long_beside_short() -> EpochRecord:
    """An epoch in which every second group has a prompt of 60 tokens, the others of at most 5."""
    data = random_epoch_record(prompts=6, k=4)
    for rollout in data.rollouts:
        if rollout.group % 2:
            rollout.prompt_ids = [2 + (rollout.group + i) % 26 for i in range(60)]
    return data


@pytest.mark.parametrize("method", [GRPO(), RLRT()], ids=["GRPO", "RLRT"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_a_limit_of_tokens_per_pass_changes_no_gradient(aggregation: Any, method: Any) -> None:
    module, data = RLRTModule(tiny_policy(), Teacher(), method, aggregation=aggregation), long_beside_short()
    signals = data.advantages, data.rewards, data.logp_old, data.logp_teacher, data.mask
    data.credit = method(*signals, torch.ones(len(data.rollouts)))

    def gradient_of(batches: list[Any]) -> torch.Tensor:
        module.zero_grad()
        for batch in batches:
            (module.training_step(batch, 0)["loss"] / len(batches)).backward()  # as Lightning does
        return torch.cat([p.grad.flatten() for p in module.policy.parameters()])

    whole = micro_batches(data, 2, 1, aggregation).batches
    for limit in (300, 140, 70):
        cut = micro_batches(data, 2, 99, aggregation, tokens_per_pass=limit)
        n = cut.accumulate
        assert n > 1
        for step in range(2):
            expected, got = gradient_of(whole[step : step + 1]), gradient_of(cut.batches[step * n : (step + 1) * n])
            assert expected.norm() > 0.01
            assert (got - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("limit", [10_000, 300, 140, 68, 67, 1])
def test_an_epoch_has_the_fewest_passes_that_keep_to_the_limit(limit: int) -> None:
    data = long_beside_short()
    cut = micro_batches(data, 2, 99, "token-mean", tokens_per_pass=limit)
    n = cut.accumulate
    assert len(cut) == 2 * n, "as many in each optimizer step"
    assert cut.longest == 68
    assert all(batch.input_ids.numel() <= limit or len(batch.input_ids) == 1 for batch in cut.batches)
    if limit >= cut.longest and n > 1:
        fewer = micro_batches(data, 2, n - 1, "token-mean").batches
        assert max(batch.input_ids.numel() for batch in fewer) > limit


def test_all_ranks_make_as_many_passes_as_the_busiest() -> None:
    data = random_epoch_record()
    alone = micro_batches(data, 2, 1, "token-mean", tokens_per_pass=64).accumulate
    cut = micro_batches(
        data, 2, 1, "token-mean", tokens_per_pass=64, from_ranks=lambda mine: [mine, [(alone + 3, 99)] * len(mine)]
    )
    assert (cut.accumulate, cut.longest) == (alone + 3, 99)
    assert len(cut) == 2 * (alone + 3)
    assert cut.batches[-1].share == 0, "a placeholder"


def test_rollouts_without_advantage_are_left_out_of_training() -> None:
    data = random_epoch_record(prompts=2)
    first, second = micro_batches(data, 2, 1, "token-mean")
    assert first.share == 0.0
    assert len(first.input_ids) == 1, "all rewards are equal, so one rollout serves as a placeholder"
    assert not first.advantages.any()
    assert second.advantages.ne(0).any(-1).all()


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_distillation_matches_the_gradient_of_the_plain_formula(aggregation: Any) -> None:
    """Compares chunks, micro-batches and the module's loss with one rollout at a time."""
    made = tiny_policy()
    made.logits_chunk = 3
    data = with_srpo_credit(random_epoch_record(), k=4)
    module = RLRTModule(made, Teacher(), SRPO(top_k=4), aggregation=aggregation)
    module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    made.zero_grad()
    for batch in micro_batches(data, 1, 3, aggregation):
        (module.training_step(batch, 0)["loss"] / 3).backward()
    got = torch.cat([p.grad.flatten() for p in made.parameters()]).clone()

    made.zero_grad()
    losses = []
    for i, r in enumerate(data.rollouts):
        logits = made.model(input_ids=torch.tensor([r.prompt_ids + r.response_ids])).logits[0]
        logp_all = logits[len(r.prompt_ids) - 1 : -1].log_softmax(-1)
        logp = logp_all.gather(-1, torch.tensor(r.response_ids)[:, None])[:, 0]
        n = len(r.response_ids)
        a, ratio = data.credit.advantages[i, :n], (logp - r.logp_sampler).exp()
        loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
        if (score := data.teacher[i]) is not None:
            own = logp_all.gather(-1, score.top_tokens.long()).exp()
            s = torch.cat([own, 1 - own.sum(-1, keepdim=True)], -1)
            t = torch.cat([score.top_logp.exp(), 1 - score.top_logp.exp().sum(-1, keepdim=True)], -1)
            m = (s + t) / 2
            gap = ((s * (s / m).log()).sum(-1) + (t * (t / m).log()).sum(-1)) / 2
            loss = loss + data.credit.distillation[i, :n] * ratio.detach().clamp(max=2) * gap
        losses.append(loss.sum() if aggregation == "token-mean" else loss.mean())
    (sum(losses) / (data.mask.sum() if aggregation == "token-mean" else len(losses))).backward()
    expected = torch.cat([p.grad.flatten() for p in made.parameters()])
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_sdpos_mean_counts_only_rollouts_with_a_context() -> None:
    data = with_srpo_credit(random_epoch_record(), k=4)
    has_context = torch.tensor([s is not None for s in data.teacher])
    data.credit = SDPO()(data.advantages, data.rewards, data.logp_old, data.logp_teacher, data.mask, has_context)
    sizes = mini_batch_sizes(data, 1)
    assert sizes.tolist() == [[int(data.mask[has_context].sum()), int(has_context.sum()), 0]]
    (batch,) = micro_batches(data, 1, 1, "token-mean")
    assert batch.share == pytest.approx(1.0)
    assert len(batch.input_ids) == has_context.sum()


def test_two_ranks_average_to_the_gradient_of_one() -> None:
    """Two ranks with half of the groups each take the same step as one rank with all."""
    made, data = tiny_policy(), random_epoch_record()
    whole = gradient(made, list(micro_batches(data, 1, 2, "token-mean")), "token-mean", 2).clone()
    totals = torch.tensor([[data.mask.sum(), len(data.rollouts)]])
    parts = []
    for rank in range(2):
        cut = micro_batches(record_of_rank(data, rank, 2), 1, 2, "token-mean", world_size=2, totals=totals)
        parts.append(gradient(made, list(cut), "token-mean", 2).clone())
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-3, atol=1e-5)


def test_bf16_true_does_not_round_the_tensors_of_a_micro_batch() -> None:
    """Under bf16-true Lightning converts every tensor that it finds in a batch; log-probs would be off by 1 %."""
    (batch,) = micro_batches(random_epoch_record(), 1, 1, "token-mean")
    seen = HalfPrecision("bf16-true").convert_input(batch)
    seen = seen.to(torch.device("cpu"))
    assert seen.logp_old.dtype == torch.float32
    assert torch.equal(seen.logp_old, batch.logp_old)
