"""The objective against independent golden vectors, and by the properties that the method has to have."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlrt_lightning.objective import GRPO, RLRT, RLSD, clipped_surrogate, group_advantages, pass_at_k
from tests.conftest import SHARED

GOLDEN = SHARED / "golden" / "objective.json"
CASES = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else []
needs_golden = pytest.mark.skipif(not CASES, reason="shared/golden/objective.json is not beside this checkout")


def method_of(case: dict[str, Any]) -> Any:
    p = case["params"]
    settings = {k: p[k] for k in ("lam", "eps_w", "success_threshold", "normalize_std")}
    return {
        "grpo": lambda: GRPO(normalize_std=p["normalize_std"]),
        "rlrt": lambda: RLRT(**settings),
        "rlrt_all": lambda: RLRT(gated=False, **settings),
        "rlsd": lambda: RLSD(**settings),
        "rlsd_correct": lambda: RLSD(gated=True, **settings),
    }[case["method"]]()


def close(actual: Tensor, expected: Any) -> None:
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


@needs_golden
@pytest.mark.parametrize("case", [c for c in CASES if c["kind"] == "credit"], ids=lambda c: c["name"])
def test_golden_credit(case: dict[str, Any]) -> None:
    t = {k: torch.tensor(v, dtype=torch.float64) for k, v in case.items() if isinstance(v, list)}
    p, expect, mask = case["params"], case["expect"], t["mask"].bool()
    method = method_of(case)

    advantages = group_advantages(t["rewards"], t["groups"].long(), p["normalize_std"], p["eps_std"])
    close(advantages, expect["advantage"])
    credit = method(advantages, t["rewards"], t["logp_student"], t["logp_teacher"], mask, t["has_context"].bool())
    close(credit.asymmetry, expect["asymmetry"])
    close(credit.weights, expect["weight"])
    close(credit.advantages, expect["token_advantage"])

    logp_new = t["logp_new"].requires_grad_()
    out = clipped_surrogate(
        logp_new,
        t["logp_student"],
        credit.advantages,
        mask,
        p["clip_low"],
        p["clip_high"],
        p["dual_clip"],
        p["aggregation"],
    )
    close(out.loss, expect["loss"])
    close(out.clip_fraction, expect["clip_fraction"])
    out.loss.backward()
    close(logp_new.grad, expect["grad_logp_new"])


@needs_golden
def test_golden_pass_at_k() -> None:
    (case,) = [c for c in CASES if c["kind"] == "pass_at_k"]
    for (n, c, k), expected in zip(case["inputs"], case["expect"], strict=True):
        close(pass_at_k(n, c, k), expected)


class Batch:
    """A random batch in float64: 3 groups of 4 roll-outs in shuffled order, responses of 1 to 6 tokens."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        n, t = 12, 6
        self.groups = torch.arange(3).repeat_interleave(4)[torch.randperm(n, generator=g)]
        self.rewards = torch.randint(0, 2, (n,), generator=g).double()
        self.mask = torch.arange(t)[None] < torch.randint(1, t + 1, (n, 1), generator=g)
        self.logp_student, self.logp_teacher = -3 * torch.rand(2, n, t, generator=g, dtype=torch.float64)
        self.has_context = torch.rand(n, generator=g) < 0.7

    def credit(self, method: Any, **changes: Any) -> Any:
        v = {**vars(self), **changes}
        a = group_advantages(v["rewards"], v["groups"], method.normalize_std)
        return method(a, v["rewards"], v["logp_student"], v["logp_teacher"], v["mask"], v["has_context"])


seeds = st.integers(0, 2**31)
batches = settings(max_examples=40, derandomize=True, deadline=None)
WEIGHTED = [RLRT(), RLRT(gated=False), RLRT(lam=1.0, eps_w=0.5), RLSD(), RLSD(gated=True, lam=1.0)]


@given(seeds)
@batches
def test_lam_zero_is_grpo(seed: int) -> None:
    batch = Batch(seed)
    grpo = batch.credit(GRPO(normalize_std=True))
    for method in (RLRT(lam=0.0), RLRT(lam=0.0, gated=False), RLSD(lam=0.0)):
        torch.testing.assert_close(batch.credit(method).advantages, grpo.advantages, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", WEIGHTED)
@given(seed=seeds)
@batches
def test_without_context_the_weight_is_one(method: Any, seed: int) -> None:
    batch = Batch(seed)
    out = batch.credit(
        method, has_context=torch.zeros(12, dtype=torch.bool), logp_teacher=torch.full((12, 6), torch.nan)
    )
    assert torch.equal(out.weights, batch.mask.double())
    assert not out.asymmetry.any()


@pytest.mark.parametrize("method", [GRPO(), *WEIGHTED])
@given(seed=seeds)
@batches
def test_padding_changes_nothing(method: Any, seed: int) -> None:
    batch = Batch(seed)
    junk = torch.full((12, 3), torch.nan, dtype=torch.float64)
    wide = batch.credit(
        method,
        mask=torch.cat([batch.mask, torch.zeros(12, 3, dtype=torch.bool)], 1),
        logp_student=torch.cat([batch.logp_student, junk], 1),
        logp_teacher=torch.cat([batch.logp_teacher, junk], 1),
    )
    for got, expected in zip(vars(wide).values(), vars(batch.credit(method)).values(), strict=True):
        assert torch.equal(got[:, :6], expected)
        assert not got[:, 6:].any()


@pytest.mark.parametrize("method", [GRPO(), *WEIGHTED])
@given(seed=seeds)
@batches
def test_order_of_rollouts_changes_nothing(method: Any, seed: int) -> None:
    batch = Batch(seed)
    p = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    shuffled = batch.credit(method, **{k: v[p] for k, v in vars(batch).items()})
    torch.testing.assert_close(shuffled.advantages, batch.credit(method).advantages[p], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", WEIGHTED)
@given(seed=seeds)
@batches
def test_perturbation_is_bounded_and_keeps_the_sign(method: Any, seed: int) -> None:
    batch = Batch(seed)
    a = group_advantages(batch.rewards, batch.groups)[:, None] * batch.mask
    out = batch.credit(method).advantages
    assert ((out - a).abs() <= method.lam * method.eps_w * a.abs() + 1e-12).all()
    assert (out * a >= 0).all()


@given(seed=seeds)
@batches
def test_the_teacher_is_asked_for_just_the_rollouts_that_it_changes(seed: int) -> None:
    """Leaving out the context of all others gives the same credit."""
    batch = Batch(seed)
    for method in WEIGHTED:
        a = group_advantages(batch.rewards, batch.groups, method.normalize_std)
        needed = batch.has_context & method.uses_teacher(a, batch.rewards)
        assert torch.equal(batch.credit(method, has_context=needed).advantages, batch.credit(method).advantages)


def test_rlrt_credits_what_the_teacher_did_not_expect_and_rlsd_the_opposite() -> None:
    rewards, groups = torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.long)
    student, teacher = torch.full((2, 2), -1.0), torch.tensor([[-2.0, -0.5]]).expand(2, 2)
    args = (group_advantages(rewards, groups), rewards, student, teacher, torch.ones(2, 2), torch.ones(2))
    rlrt, rlsd = RLRT()(*args), RLSD()(*args)
    assert rlrt.weights[0, 0] > 1 > rlrt.weights[0, 1]
    assert rlsd.weights[0, 0] < 1 < rlsd.weights[0, 1]
    assert torch.equal(rlrt.weights[1], torch.ones(2)), "a wrong roll-out keeps plain GRPO credit"


def test_lam_decays_linearly_to_zero() -> None:
    method = RLRT(lam=0.8, lam_decay_steps=10)
    assert [round(method.at(s).lam, 6) for s in (0, 5, 10, 20)] == [0.8, 0.4, 0.0, 0.0]
    assert RLRT(lam=0.8).at(1000).lam == 0.8


def test_equal_rewards_have_advantage_exactly_zero() -> None:
    rewards, groups = torch.tensor([0.1] * 7 + [0.3]), torch.tensor([0] * 7 + [1])
    assert not group_advantages(rewards, groups).any()


def test_surrogate_ignores_what_is_masked_and_has_no_gradient_there() -> None:
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


@pytest.mark.parametrize("bad", [(4, 2, 5), (4, 5, 2), (4, 2, 0)])
def test_pass_at_k_refuses_nonsense(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"pass@|correct"):
        pass_at_k(*bad)
