"""AntiSD, RLCSD, the contrastive RLRT, and the options of other methods."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlrt_lightning import GRPO, RLCSD, RLRT, RLSD, SDPO, AntiSD, EntropyGate, clipped_surrogate, two_path_surrogate

seeds = st.integers(0, 2**31)
examples = settings(max_examples=40)


def batch(seed: int, n: int = 10, c: int = 3, t: int = 7) -> dict[str, Tensor]:
    """Random inputs of a method in float64, with rollouts of zero advantage and invalid failed siblings."""
    g = torch.Generator().manual_seed(seed)
    advantages = torch.randn(n, generator=g, dtype=torch.float64) * (torch.rand(n, generator=g) < 0.7)
    return {
        "advantages": advantages,
        "rewards": (advantages > 0).double(),
        "logp_student": -4 * torch.rand(n, t, generator=g, dtype=torch.float64),
        "logp_teacher": -4 * torch.rand(n, t, generator=g, dtype=torch.float64),
        "mask": torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=g),
        "has_context": torch.rand(n, generator=g) < 0.8,
        "logp_teacher_wrong": -4 * torch.rand(n, c, t, generator=g, dtype=torch.float64),
        "wrong_valid": torch.rand(n, c, generator=g) < 0.5,
        "thoughts": torch.rand(n, t, generator=g) < 0.5,
    }


# -- AntiSD --------------------------------------------------------------------------------------------------------


@given(seeds, st.floats(0.1, 3))
@examples
def test_antisd_adds_at_most_half_of_lam_log_2_and_more_the_more_the_student_disagrees(seed: int, lam: float) -> None:
    values = batch(seed)
    credit = AntiSD(lam=lam)(**values)
    added = (credit.advantages - values["advantages"][:, None])[values["mask"] & values["has_context"][:, None]]
    asymmetry = credit.asymmetry[values["mask"] & values["has_context"][:, None]]
    assert (added <= lam * math.log(2) / 2).all()
    assert torch.equal(added > 1e-12, asymmetry > 1e-12)
    assert torch.equal(added.argsort(), asymmetry.argsort())


def test_antisd_acts_on_failed_rollouts_and_without_an_advantage_unless_its_gate_is_closed() -> None:
    values = batch(0)
    values["has_context"][:] = True
    plain = GRPO(normalize_std=True)(**values).advantages
    opened, closed = (AntiSD()(**values, gate_open=gate).advantages for gate in (True, False))
    assert (opened != plain)[values["mask"]].all()
    assert (values["advantages"] == 0).any()
    assert torch.equal(closed, plain)


def test_antisd_stays_exact_where_the_teacher_is_far_away() -> None:
    ones = torch.ones(1, 3)
    far = torch.tensor([[-1.0, -50.0, -1e9]], dtype=torch.float64)
    credit = AntiSD(lam=1.0)(torch.zeros(1), torch.zeros(1), ones.double() * -1, far, ones, torch.ones(1))
    expected = [0.0, -(math.log1p(math.exp(-49)) - math.log(2)) / 2, math.log(2) / 2]
    torch.testing.assert_close(credit.advantages, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_gate_closes_below_and_opens_at_the_reference() -> None:
    gate = EntropyGate(warmup_steps=4, close_at=0.5)
    assert [gate.step(h) for h in (1.0, 4.0, 2.0, 8.0)] == [False] * 4
    assert gate.warm_entropy == 3.0, "the mean of the two middle ones"
    # open at first; 1.5 is not below 0.5 * 3; it closes below, and opens again at 3 only
    assert [gate.step(h) for h in (1.6, 1.5, 1.4, 2.9, 3.0, 1.5, 1.0)] == [True, True, False, False, True, True, False]
    assert all(EntropyGate(0).step(h) for h in (1.0, 0.0))


# -- RLCSD and the contrast ----------------------------------------------------------------------------------------


@given(seeds, st.floats(0.1, 5))
@examples
def test_rlcsd_never_flips_a_sign_and_changes_selected_tokens_only(seed: int, beta: float) -> None:
    values = batch(seed)
    credit = RLCSD(beta=beta, lam=1.0, tau=0.5, residual_low=-2, residual_high=3)(**values)
    a = values["advantages"][:, None] * values["mask"]
    assert (credit.advantages * a >= 0).all()
    assert not credit.advantages[a == 0].any()
    assert torch.equal(credit.advantages[~credit.selected], a[~credit.selected])
    contrasted = values["has_context"] & values["wrong_valid"].any(-1)
    assert not (credit.selected & ~contrasted[:, None]).any()
    kept = credit.selected & (a != 0) & (credit.advantages != 0)
    assert torch.equal((credit.advantages - a)[kept] > 0, credit.contrast[kept] > 0)


@given(seeds)
@examples
def test_the_contrast_ignores_effects_that_every_demonstration_has(seed: int) -> None:
    """Adding the same values to the teacher's log-probs with each context changes nothing, unlike in plain RLRT."""
    values = batch(seed)
    style = torch.randn(10, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    both = {"logp_teacher": values["logp_teacher"] + style}
    both["logp_teacher_wrong"] = values["logp_teacher_wrong"] + style[:, None]
    for method in (RLCSD(beta=1.0, tau=0.5), RLRT(contrast=True)):
        one, other = method(**values), method(**{**values, **both})
        torch.testing.assert_close(one.advantages, other.advantages, rtol=0, atol=1e-12)
    assert not torch.allclose(RLRT(gated=False)(**values).weights, RLRT(gated=False)(**{**values, **both}).weights)


def test_the_contrastive_rlrt_credits_tokens_that_the_successful_sibling_makes_less_likely() -> None:
    """Three rollouts, correct, wrong, and correct without a failed sibling."""
    teacher = torch.tensor([[-2.0, -0.5]]).expand(3, 2).double()
    wrong = torch.stack([torch.full((3, 2), -1.0), torch.full((3, 2), -1.0), torch.full((3, 2), 9.0)], 1).double()
    valid = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 0]])
    a = torch.tensor([1.0, -1.0, 1.0])
    student = torch.full((3, 2), -7.0).double()
    args = a, (a > 0).double(), student, teacher, torch.ones(3, 2), torch.ones(3)
    credit = RLRT(gated=False, contrast=True)(*args, logp_teacher_wrong=wrong, wrong_valid=valid)
    w = [math.exp(1.0), math.exp(-0.5)]
    expected = torch.tensor([w, [1 / w[0], 1 / w[1]], [1.0, 1.0]])
    torch.testing.assert_close(credit.weights, expected.double())
    torch.testing.assert_close(credit.contrast, torch.tensor([[-1.0, 0.5], [-1.0, 0.5], [0.0, 0.0]]).double())
    gated = RLRT(contrast=True)(*args, logp_teacher_wrong=wrong, wrong_valid=valid).weights
    torch.testing.assert_close(gated[1], torch.ones(2).double())
    torch.testing.assert_close(gated[0], expected[0].double())


def test_one_failed_sibling_or_several_equal_ones_give_the_same_contrast() -> None:
    values = batch(1, c=1)
    values["wrong_valid"][:] = True
    several = {"logp_teacher_wrong": values["logp_teacher_wrong"].expand(10, 4, 7), "wrong_valid": torch.ones(10, 4)}
    one, four = (RLCSD()(**{**values, **more}).contrast for more in ({}, several))
    torch.testing.assert_close(one, four, rtol=0, atol=1e-12)


def test_methods_without_the_scores_they_need_say_so() -> None:
    values = batch(2)
    for name in ("logp_teacher_wrong", "wrong_valid", "thoughts"):
        del values[name]
    for method in (RLCSD(), RLRT(contrast=True)):
        with pytest.raises(ValueError, match="needs logp_teacher_wrong and wrong_valid"):
            method(**values)
    with pytest.raises(ValueError, match="needs thoughts"):
        RLSD(thoughts_only=True)(**values)


def test_the_two_path_loss_is_two_means() -> None:
    values = batch(3)
    new = values["logp_student"] + 0.3 * values["logp_teacher"]
    old, a, mask = values["logp_student"], values["advantages"][:, None].expand(10, 7), values["mask"]
    for selected in (values["thoughts"], torch.zeros_like(mask), torch.ones_like(mask)):
        parts = [clipped_surrogate(new, old, a, mask & rows, 0.2, 0.2).loss for rows in (~selected, selected)]
        got = two_path_surrogate(new, old, a, mask, selected, 0.2, 0.2, eta=0.7)
        torch.testing.assert_close(got.loss, parts[0] + 0.7 * parts[1])


# -- options -------------------------------------------------------------------------------------------------------


def test_thoughts_only_leaves_weight_one_outside_the_thinking() -> None:
    values = batch(4)
    every, some = RLSD()(**values), RLSD(thoughts_only=True)(**values)
    inside = values["thoughts"] & values["mask"]
    assert torch.equal(some.weights[inside], every.weights[inside])
    assert (some.weights[~values["thoughts"] & values["mask"]] == 1).all()
    assert (every.weights[~values["thoughts"] & values["mask"]] != 1).any()


@pytest.mark.parametrize("method", [RLRT, RLSD, AntiSD, RLCSD])
def test_lam_rises_then_decays(method: Any) -> None:
    lam = lambda step, **steps: method(lam=0.4, **steps).at(step).lam  # noqa: E731
    assert [lam(s, lam_warmup_steps=4) for s in (0, 1, 4, 99)] == pytest.approx([0.0, 0.1, 0.4, 0.4])
    assert [lam(s, lam_decay_steps=4) for s in (0, 1, 4, 99)] == pytest.approx([0.4, 0.3, 0.0, 0.0])
    both = {"lam_warmup_steps": 2, "lam_decay_steps": 4}
    assert [lam(s, **both) for s in (0, 1, 2, 4, 6, 7)] == pytest.approx([0.0, 0.2, 0.4, 0.2, 0.0, 0.0])
    assert method(lam=0.4, **both).at(3).at(99).lam == pytest.approx(0.3), "the schedule is applied once"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AntiSD(lam=-1), "AntiSD.lam is -1"),
        (lambda: AntiSD(warmup_steps=-1), "AntiSD.warmup_steps is -1"),
        (lambda: AntiSD(close_at=1.5), "AntiSD.close_at is 1.5"),
        (lambda: AntiSD(context="none"), "AntiSD.context is 'none'"),
        (lambda: RLCSD(tau=0), "RLCSD.tau is 0"),
        (lambda: RLCSD(beta=-0.1), "RLCSD.beta is -0.1"),
        (lambda: RLCSD(delta=-1), "RLCSD.delta is -1"),
        (lambda: RLCSD(eta=-1), "RLCSD.eta is -1"),
        (lambda: RLCSD(residual_low=0.1), "RLCSD.residual_low is 0.1"),
        (lambda: RLRT(lam_warmup_steps=0), "RLRT.lam_warmup_steps is 0"),
        (lambda: RLSD(lam_decay_steps=0), "RLSD.lam_decay_steps is 0"),
        (lambda: RLRT(contrast=True, context="answer"), "RLRT.contrast compares siblings"),
        (lambda: SDPO(feedback=True, context="feedback"), "SDPO.feedback is true"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_out_of_range_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
