"""Required properties of the objective (test_golden.py checks its values)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlrt_lightning.objective import (
    DIVER,
    GRPO,
    RLCSD,
    RLRT,
    RLSD,
    SDPO,
    SRPO,
    AntiSD,
    Credit,
    EntropyBonus,
    Needs,
    Signals,
    TeacherWeights,
    clipped_surrogate,
    distillation_loss,
    divergence,
    group_advantages,
    importance_weights,
    pass_at_k,
)

MORE = "teacher_entropy", "logp_teacher_wrong", "wrong_valid", "thoughts"
"""The signals that only some methods need."""


class Batch:
    """A random batch in float64: 3 groups of 4 rollouts in shuffled order, responses of 1 to 6 tokens."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        n, t = 12, 6
        self.groups = torch.arange(3).repeat_interleave(4)[torch.randperm(n, generator=g)]
        self.rewards = torch.randint(0, 2, (n,), generator=g).double()
        self.mask = torch.arange(t)[None] < torch.randint(1, t + 1, (n, 1), generator=g)
        self.logp_student, self.logp_teacher = -3 * torch.rand(2, n, t, generator=g, dtype=torch.float64)
        self.has_context = torch.rand(n, generator=g) < 0.7
        self.teacher_entropy = 2 * torch.rand(n, t, generator=g, dtype=torch.float64)
        self.logp_teacher_wrong = -3 * torch.rand(n, 2, t, generator=g, dtype=torch.float64)
        self.wrong_valid = torch.rand(n, 2, generator=g) < 0.7
        self.thoughts = torch.rand(n, t, generator=g) < 0.5

    def credit(self, method: Any, **changes: Any) -> Any:
        v = {**vars(self), **changes}
        a = group_advantages(v["rewards"], v["groups"], method.normalize_std)
        signals = a, v["rewards"], v["logp_student"], v["logp_teacher"], v["mask"], v["has_context"]
        return method(*signals, **{name: v[name] for name in MORE})


seeds = st.integers(0, 2**31)
batches = settings(max_examples=40)
WEIGHTED = [
    RLRT(),
    RLRT(gated=False),
    RLRT(lam=1.0, eps_w=0.5),
    RLRT(contrast=True),
    RLSD(),
    RLSD(gated=True, lam=1.0),
    RLSD(context="sibling", contrast=True, thoughts_only=True),
]
ADDITIVE = [AntiSD(), RLCSD(beta=1.0, tau=0.5), RLCSD(beta=2.0, lam=1.0, tau=0.5, residual_low=-2, residual_high=2)]
METHODS = [GRPO(), EntropyBonus(), SDPO(), SRPO(), *WEIGHTED, *ADDITIVE]


def tensors(credit: Any) -> dict[str, Tensor]:
    return {name: value for name, value in vars(credit).items() if isinstance(value, Tensor)}


@given(seeds)
@batches
def test_lam_zero_is_grpo_with_std(seed: int) -> None:
    batch = Batch(seed)
    grpo = batch.credit(GRPO(normalize_std=True))
    weighted = RLRT(lam=0.0), RLRT(lam=0.0, gated=False), RLRT(lam=0.0, contrast=True), RLSD(lam=0.0)
    for method in (*weighted, AntiSD(lam=0.0), RLCSD(lam=0.0), RLCSD(lam=0.0, delta=0.0)):
        torch.testing.assert_close(batch.credit(method).advantages, grpo.advantages, rtol=0, atol=1e-12)
        assert batch.credit(method).selected is None or not batch.credit(method).selected.any()
        assert not method.uses_teacher(grpo.advantages[:, 0], batch.rewards).any(), "nothing is scored in vain"


@pytest.mark.parametrize("method", [*WEIGHTED, *ADDITIVE])
@given(seed=seeds)
@batches
def test_without_context_the_credit_is_grpos(method: Any, seed: int) -> None:
    batch = Batch(seed)
    none = torch.zeros(12, dtype=torch.bool)
    junk = torch.full((12, 6), torch.nan)
    out = batch.credit(method, has_context=none, logp_teacher=junk, logp_teacher_wrong=junk[:, None].expand(12, 2, 6))
    assert torch.equal(out.weights, batch.mask.double())
    assert not out.asymmetry.any()
    assert torch.equal(out.advantages, batch.credit(GRPO(method.normalize_std)).advantages)


@pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, SRPO)])
@given(seed=seeds)
@batches
def test_the_credit_of_a_rollout_does_not_depend_on_its_neighbours(method: Any, seed: int) -> None:
    """Given its advantage. SRPO's weights are relative to those of all wrong rollouts."""
    batch = Batch(seed)
    advantages = group_advantages(batch.rewards, batch.groups, method.normalize_std)
    names = "rewards", "logp_student", "logp_teacher", "mask", "has_context"
    every, row = tensors(batch.credit(method)), slice(seed % 12, seed % 12 + 1)
    values = {name: value[row] for name, value in vars(batch).items()}
    alone = method(advantages[row], *(values[n] for n in names), **{n: values[n] for n in MORE})
    for name, got in tensors(alone).items():
        torch.testing.assert_close(got, every[name][row], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@given(seed=seeds)
@batches
def test_padding_does_not_change_the_credit(method: Any, seed: int) -> None:
    batch = Batch(seed)
    junk = torch.full((12, 3), torch.nan, dtype=torch.float64)
    wide = batch.credit(
        method,
        mask=torch.cat([batch.mask, torch.zeros(12, 3, dtype=torch.bool)], 1),
        thoughts=torch.cat([batch.thoughts, torch.ones(12, 3, dtype=torch.bool)], 1),
        logp_student=torch.cat([batch.logp_student, junk], 1),
        logp_teacher=torch.cat([batch.logp_teacher, junk], 1),
        teacher_entropy=torch.cat([batch.teacher_entropy, junk], 1),
        logp_teacher_wrong=torch.cat([batch.logp_teacher_wrong, junk[:, None].expand(12, 2, 3)], 2),
    )
    narrow = tensors(batch.credit(method))
    for name, got in tensors(wide).items():
        if name != "counted":
            torch.testing.assert_close(got[:, :6], narrow[name], rtol=0, atol=1e-12)
            assert not got[:, 6:].any()


@pytest.mark.parametrize("method", METHODS)
@given(seed=seeds)
@batches
def test_the_order_of_rollouts_does_not_change_the_credit(method: Any, seed: int) -> None:
    batch = Batch(seed)
    p = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    shuffled = batch.credit(method, **{k: v[p] for k, v in vars(batch).items()})
    ordered = tensors(batch.credit(method))
    for name, got in tensors(shuffled).items():
        torch.testing.assert_close(got, ordered[name][p], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", WEIGHTED)
@given(seed=seeds)
@batches
def test_the_perturbation_is_bounded_and_keeps_the_sign(method: Any, seed: int) -> None:
    batch = Batch(seed)
    a = group_advantages(batch.rewards, batch.groups)[:, None] * batch.mask
    out = batch.credit(method).advantages
    assert ((out - a).abs() <= method.lam * method.eps_w * a.abs() + 1e-12).all()
    assert (out * a >= 0).all()


@given(seed=seeds)
@batches
def test_uses_teacher_selects_the_rollouts_whose_credit_the_teacher_changes(seed: int) -> None:
    """Dropping the context of all other rollouts gives the same credit."""
    batch = Batch(seed)
    for method in METHODS:
        a = group_advantages(batch.rewards, batch.groups, method.normalize_std)
        needed = batch.has_context & method.uses_teacher(a, batch.rewards)
        asked, all_ = batch.credit(method, has_context=needed), batch.credit(method)
        assert torch.equal(asked.advantages, all_.advantages)
        if all_.distillation is not None:
            assert torch.equal(asked.distillation, all_.distillation)


@pytest.mark.smoke
def test_rlrt_upweights_tokens_unlikely_for_the_teacher_and_rlsd_downweights_them() -> None:
    rewards, groups = torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.long)
    student, teacher = torch.full((2, 2), -1.0), torch.tensor([[-2.0, -0.5]]).expand(2, 2)
    args = (group_advantages(rewards, groups), rewards, student, teacher, torch.ones(2, 2), torch.ones(2))
    rlrt, rlsd = RLRT()(*args), RLSD()(*args)
    assert rlrt.weights[0, 0] > 1 > rlrt.weights[0, 1]
    assert rlsd.weights[0, 0] < 1 < rlsd.weights[0, 1]
    assert torch.equal(rlrt.weights[1], torch.ones(2)), "a wrong rollout keeps plain GRPO credit"


def test_rlrt_all_equals_rlrt_if_no_wrong_rollout_has_a_context() -> None:
    batch = Batch(3)
    correct = batch.rewards == 1
    for has_context, rewards in (
        (batch.has_context & correct, batch.rewards),
        (batch.has_context, 0.5 + 0.5 * batch.rewards),  # partial credit: all succeed, with different rewards
    ):
        gated, all_ = (batch.credit(m, has_context=has_context, rewards=rewards) for m in (RLRT(), RLRT(gated=False)))
        assert torch.equal(gated.advantages, all_.advantages)
        assert gated.weights.ne(batch.mask.double()).any()
    assert not torch.equal(batch.credit(RLRT()).advantages, batch.credit(RLRT(gated=False)).advantages)


def test_teacher_predicted_is_rlrt_with_the_inverse_weight() -> None:
    batch = Batch(4)
    torch.testing.assert_close(
        batch.credit(RLSD(gated=True)).weights, torch.where(batch.mask, 1 / batch.credit(RLRT()).weights, 0.0)
    )


def test_sdpo_distills_every_rollout_with_a_context_and_no_other() -> None:
    batch = Batch(5)
    credit = batch.credit(SDPO())
    assert not credit.advantages.any()
    assert torch.equal(credit.distillation, (batch.mask & batch.has_context[:, None]).double())
    assert torch.equal(credit.counted, batch.has_context)
    assert torch.equal(credit.trains, batch.has_context)


def test_srpo_routes_by_reward_and_shares_one_denominator() -> None:
    batch = Batch(6)
    credit, grpo = batch.credit(SRPO()), batch.credit(GRPO())
    corrected = (batch.rewards == 0) & batch.has_context
    assert 0 < corrected.sum() < len(corrected)
    assert torch.equal(credit.advantages[~corrected], grpo.advantages[~corrected])
    assert not credit.advantages[corrected].any()
    assert not credit.distillation[~corrected].any()
    assert credit.counted is None, "every rollout is in the mean"

    tokens = batch.mask & corrected[:, None]
    weights = torch.exp(-batch.teacher_entropy) * tokens
    torch.testing.assert_close(credit.distillation, weights / weights.sum() * tokens.sum())
    assert torch.equal(batch.credit(SRPO(beta=0.0)).distillation, tokens.double())

    old, new = batch.logp_student, batch.logp_student - 0.1
    gap = batch.teacher_entropy  # in place of a divergence
    loss = clipped_surrogate(new, old, credit.advantages, batch.mask).loss
    loss = loss + distillation_loss(gap, new, old, credit.distillation, batch.mask)
    ratio, a = (new - old).exp(), credit.advantages
    surrogate = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)[batch.mask].sum()
    divergences = (credit.distillation * ratio * gap)[batch.mask].sum()
    torch.testing.assert_close(loss, (surrogate + divergences) / batch.mask.sum())


def test_the_importance_weight_of_distillation_is_capped_and_has_no_gradient() -> None:
    new = torch.tensor([[0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    gap = torch.tensor([[1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    loss = distillation_loss(gap, new, torch.tensor([[-5.0, 1.0]]), torch.ones(1, 2), torch.ones(1, 2))
    loss.backward()
    torch.testing.assert_close(gap.grad, torch.tensor([[2.0, torch.e**-1]], dtype=torch.float64) / 2)
    assert new.grad is None


def test_importance_weights_are_truncated_ratios_that_scale_the_surrogate() -> None:
    policy_, sampler = torch.tensor([[-1.0, -1.0, 9.0]]), torch.tensor([[-2.0, -0.5, 0.0]])
    mask = torch.tensor([[True, True, False]])
    expected = {"token": [[2.0, 0.6065307, 0.0]], "sequence": [[1.6487213, 1.6487213, 0.0]], "off": [[1.0, 1.0, 0.0]]}
    for level, values in expected.items():
        torch.testing.assert_close(importance_weights(policy_, sampler, mask, level), torch.tensor(values))
    plain = clipped_surrogate(policy_, policy_, torch.ones(1, 3), mask)
    weighted = clipped_surrogate(policy_, policy_, torch.ones(1, 3), mask, importance=torch.tensor([[3.0, 1.0, 9.0]]))
    assert (plain.loss, weighted.loss) == (-1, -2)
    assert importance_weights(policy_, sampler, mask, "sequence", cap=1.5).max() == 1.5


def test_the_entropy_bonus_also_trains_groups_without_advantage() -> None:
    batch = Batch(7)
    same = torch.ones_like(batch.rewards)
    assert not batch.credit(GRPO(), rewards=same).trains.any()
    credit = batch.credit(EntropyBonus(coef=0.1), rewards=same)
    assert torch.equal(credit.entropy_bonus, 0.1 * batch.mask.double())
    assert credit.trains.all()
    assert torch.equal(batch.credit(EntropyBonus()).advantages, batch.credit(GRPO()).advantages)


TEXTS = ["the sum of two is $4$", "the sum of two is $4$", "add one more: $x=4$ so $4$", "no idea at all, sorry"]


def test_diver_rewards_correct_rollouts_for_differing_from_their_siblings() -> None:
    rewards, groups = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.zeros(4, dtype=torch.long)
    for method in (DIVER(scale=0.5), DIVER(scale=0.5, diversity="formulas")):
        gain = method.shape_rewards(rewards, groups, TEXTS) - rewards
        assert gain[3] == 0, "a wrong rollout gains nothing, however different it is"
        assert gain[0] == gain[1] < gain[2] <= 0.5
    assert (DIVER(scale=0.5, diversity="formulas").shape_rewards(rewards, groups, TEXTS) - rewards)[2] == 0.25
    capped = DIVER(scale=0.5, cap=0.2).shape_rewards(rewards, groups, TEXTS) - rewards
    torch.testing.assert_close(capped.max(), torch.tensor(0.1))


def test_diver_compares_only_within_groups_and_ends_after_its_steps() -> None:
    rewards, groups = torch.ones(4), torch.tensor([0, 1, 0, 1])
    alone = DIVER().shape_rewards(rewards, torch.arange(4), TEXTS)
    assert torch.equal(alone, rewards), "without siblings there is nothing to differ from"
    pairs = DIVER().shape_rewards(rewards, groups, ["same words here now", "a b c", "same words here now", "d e f"])
    torch.testing.assert_close(pairs, torch.tensor([1.0, 1.1, 1.0, 1.1]))
    method = DIVER(steps=10)
    assert method.at(9) is method
    assert torch.equal(method.at(10).shape_rewards(rewards, groups, TEXTS), rewards)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("top_k", [None, 3, 7])
def test_divergence_is_non_negative_and_its_gradient_correct(alpha: float, top_k: int | None) -> None:
    g = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    assert (divergence(student, teacher, alpha, top_k) > 0).all()
    assert divergence(student, student, alpha, top_k).abs().max() < 1e-12
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: divergence(s, teacher, alpha, top_k), student)


def test_divergence_of_a_near_one_hot_distribution_is_finite_in_float32() -> None:
    sure = torch.tensor([[200.0, 0.0, 0.0, 0.0]], requires_grad=True)
    for alpha in (0.0, 0.5, 1.0):
        out = divergence(sure, torch.zeros(1, 4), alpha, top_k=2)
        assert torch.isfinite(out).all()
        assert torch.isfinite(torch.autograd.grad(out.sum(), sure)[0]).all()


def test_lam_decays_linearly_to_zero() -> None:
    method = RLRT(lam=0.8, lam_decay_steps=10)
    assert [round(method.at(s).lam, 6) for s in (0, 5, 10, 20)] == [0.8, 0.4, 0.0, 0.0]
    assert RLRT(lam=0.8).at(1000).lam == 0.8


def test_equal_rewards_have_advantage_exactly_zero() -> None:
    rewards, groups = torch.tensor([0.1] * 7 + [0.3]), torch.tensor([0] * 7 + [1])
    assert not group_advantages(rewards, groups).any()


def test_masked_tokens_add_no_loss_and_no_gradient() -> None:
    logp = torch.tensor([[-1.0, torch.nan]], requires_grad=True)
    out = clipped_surrogate(logp, torch.tensor([[-1.0, -2.0]]), torch.tensor([[1.0, 5.0]]), torch.tensor([[1, 0]]))
    out.loss.backward()
    assert out.loss == -1
    assert logp.grad.tolist() == [[-1.0, 0.0]]


@pytest.mark.parametrize("method", [RLRT, RLSD])
@pytest.mark.parametrize(
    "bad", [{"lam": 1.5}, {"eps_w": -0.1}, {"eps_w": 2.0}, {"context": "none"}, {"lam_decay_steps": 0}]
)
def test_settings_out_of_range_are_refused_by_name(method: Any, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{method.__name__}.{next(iter(bad))}"):
        method(**bad)


@pytest.mark.parametrize(
    ("method", "bad"),
    [
        (SDPO, {"alpha": 1.5}),
        (SDPO, {"top_k": 0}),
        (SRPO, {"importance_cap": 0.0}),
        (SRPO, {"beta": -1.0}),
        (SRPO, {"context": "none"}),
        (EntropyBonus, {"coef": -1.0}),
        (DIVER, {"scale": -1.0}),
        (DIVER, {"steps": 0}),
        (DIVER, {"tokenize": "nonsense"}),
    ],
)
def test_invalid_settings_of_other_methods_are_refused_by_name(method: Any, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{method.__name__}.{next(iter(bad))}"):
        method(**bad)


@pytest.mark.parametrize("bad", [(4, 2, 5), (4, 5, 2), (4, 2, 0)])
def test_pass_at_k_refuses_impossible_counts(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"pass@|correct"):
        pass_at_k(*bad)


def test_credit_of_signals_equals_the_call_with_tensors() -> None:
    batch = Batch(8)
    for method in METHODS:
        a = group_advantages(batch.rewards, batch.groups, method.normalize_std)
        log_probs = a, batch.rewards, batch.logp_student, batch.logp_teacher
        more = {name: getattr(batch, name) for name in MORE}
        direct = method.credit(Signals(*log_probs, batch.mask, batch.has_context, **more))
        called = tensors(method(*log_probs, batch.mask.double(), batch.has_context.int(), **more))
        for name, value in tensors(direct).items():
            assert torch.equal(value, called[name])
            assert value.dtype in (torch.float64, torch.bool), name


def test_srpos_weights_are_normalized_over_the_tokens_of_all_ranks() -> None:
    """With a mean of 1, on two ranks with half of the rollouts each."""
    batch, sums = Batch(9), []
    whole = batch.credit(SRPO()).distillation
    a = group_advantages(batch.rewards, batch.groups, False)
    all_ = a, batch.rewards, batch.logp_student, batch.logp_teacher, batch.mask, batch.has_context

    def part(half: slice, sum_over_ranks: Any) -> Tensor:
        more = {"teacher_entropy": batch.teacher_entropy[half], "sum_over_ranks": sum_over_ranks}
        return SRPO()(*(values[half] for values in all_), **more).distillation

    halves = slice(0, 6), slice(6, 12)
    for half in halves:
        part(half, lambda values: sums.append(values) or values)
    for half in halves:
        torch.testing.assert_close(part(half, lambda values: sum(sums)), whole[half])


def test_missing_or_misspelt_signals_are_errors() -> None:
    with pytest.raises(ValueError, match="SRPO needs teacher_entropy"):
        Batch(10).credit(SRPO(), teacher_entropy=None)
    ones = torch.ones(2, 3)
    with pytest.raises(TypeError, match="teacher_entropi"):
        GRPO()(ones[:, 0], ones[:, 0], ones, ones, ones, ones[:, 0], teacher_entropi=ones)
    with pytest.raises(ValueError, match="given together"):
        Credit(ones, ones, ones, distillation=ones)


def test_methods_declare_their_needs() -> None:
    for method in (GRPO(), EntropyBonus(), DIVER(), RLRT(), RLRT(gated=False), RLSD(gated=True, context="sibling")):
        assert method.needs == Needs(entropy=False, top_k=0, teacher=TeacherWeights(every_n_epochs=1, ema_decay=0.0))
    assert RLSD().needs == Needs(teacher=TeacherWeights(every_n_epochs=None))
    assert SDPO(top_k=7).needs == Needs(top_k=7, teacher=TeacherWeights(every_n_epochs=1, ema_decay=0.95))
    assert SRPO(top_k=None).needs == Needs(entropy=True, top_k=None)


def test_a_teacher_is_refreshed_after_every_n_epochs() -> None:
    assert [TeacherWeights(3).due(epoch) for epoch in range(6)] == [False, False, True] * 2
    assert not any(TeacherWeights(None).due(epoch) for epoch in range(6))


@pytest.mark.parametrize("bad", [{"every_n_epochs": 0}, {"ema_decay": 1.0}, {"every_n_epochs": None, "ema_decay": 0.5}])
def test_invalid_teacher_weights_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{list(bad)[-1]} is"):
        TeacherWeights(**bad)
