"""The surrogates, the KL to a reference and the overlong penalty, compared with golden values of an independent
reference (tests/golden/README.md) and with the formulas of TRL and verl."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlrt_lightning import cispo_surrogate, clipped_surrogate, overlong_penalty, reference_kl

CASES = json.loads((Path(__file__).parents[1] / "golden" / "methods.json").read_text(encoding="utf-8"))
GSPO: dict[str, Any] = {"ratio": "sequence", "aggregation": "seq-mean-token-mean"}


def loss_of(case: dict[str, Any], logp_new: Tensor) -> Tensor:
    t = {name: torch.tensor(value, dtype=torch.float64) for name, value in case.items() if isinstance(value, list)}
    if case["kind"] == "reference_kl":
        return reference_kl(logp_new, t["logp_ref"], t["mask"])
    inputs = logp_new, t["logp_old"], t["token_advantages"], t["mask"]
    settings = case["params"]
    if case["kind"] == "cispo":
        return cispo_surrogate(*inputs, **settings).loss
    more = GSPO if case["kind"] == "gspo" else {"aggregation": "constant-length"}
    return clipped_surrogate(*inputs, **settings, **more).loss


@pytest.mark.smoke
@pytest.mark.parametrize(
    "case", [c for c in CASES if "grad_logp_new" in c["expect"] and "logp_teacher" not in c], ids=lambda c: c["name"]
)
def test_losses_and_their_gradients_match_the_golden_values(case: dict[str, Any]) -> None:
    logp_new = torch.tensor(case["logp_new"], dtype=torch.float64, requires_grad=True)
    loss = loss_of(case, logp_new)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(case["expect"]["loss"], rel=0, abs=1e-9)
    (gradient,) = torch.autograd.grad(loss, logp_new)
    expected = torch.tensor(case["expect"]["grad_logp_new"], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


@pytest.mark.smoke
def test_the_overlong_penalty_matches_the_golden_values() -> None:
    (case,) = (c for c in CASES if c["kind"] == "overlong")
    got = [float(overlong_penalty(*row)) for row in case["inputs"]]
    assert got == pytest.approx(case["expect"], rel=0, abs=1e-9)
    ((longest, buffer),) = {(row[1], row[2]) for row in case["inputs"]}
    lengths = torch.tensor([row[0] for row in case["inputs"]])
    assert overlong_penalty(lengths, longest, buffer).tolist() == got
    with pytest.raises(ValueError, match=r"from 1 to longest \(10\)"):
        overlong_penalty(1, 10, 11)


class Rollouts:
    """Random log-probs of rollouts with different lengths, moved far enough that clips bind."""

    def __init__(self, rows: int = 12, width: int = 9) -> None:
        g = torch.Generator().manual_seed(3)
        self.old = -3 * torch.rand(rows, width, generator=g, dtype=torch.float64)
        self.new = self.old + 0.5 * torch.randn(rows, width, generator=g, dtype=torch.float64)
        self.ref = self.old + 0.5 * torch.randn(rows, width, generator=g, dtype=torch.float64)
        self.mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=g)
        self.a = torch.randn(rows, 1, generator=g, dtype=torch.float64).expand(rows, width)
        self.new.requires_grad_()


def trl_ratio(r: Rollouts, level: str) -> Tensor:
    """TRL's importance ratio (`importance_sampling_level`); "sequence" is GSPO's, with the gradient of the mean."""
    difference = r.new - r.old
    if level == "sequence":
        difference = ((difference * r.mask).sum(-1) / r.mask.sum(-1))[:, None]
    return difference.exp()


def trl_loss(r: Rollouts, loss_type: str, level: str = "token", beta: float = 0.0) -> Tensor:
    """The losses of TRL's documentation of GRPO (`loss_type`), with epsilon 0.2 and epsilon_high 0.28."""
    rho = trl_ratio(r, level)
    per_token = -torch.minimum(rho * r.a, rho.clamp(0.8, 1.28) * r.a)
    if loss_type == "cispo":
        per_token = -rho.clamp(max=1.28).detach() * r.a * r.new
    per_token = per_token + beta * ((r.ref - r.new).exp() - (r.ref - r.new) - 1)
    kept = per_token * r.mask
    if loss_type == "grpo":
        return (kept.sum(-1) / r.mask.sum(-1)).mean()
    if loss_type == "dr_grpo":
        return kept.sum() / (len(kept) * 16)
    return kept.sum() / r.mask.sum()


def ours(r: Rollouts, beta: float = 0.0, aggregation: Any = "token-mean", **settings: Any) -> Tensor:
    size = {"aggregation": aggregation, "length": 16}
    inputs = r.new, r.old, r.a, r.mask
    if settings.pop("cispo", False):
        return cispo_surrogate(*inputs, 0.28, **size).loss
    return clipped_surrogate(*inputs, **settings, **size).loss + beta * reference_kl(r.new, r.ref, r.mask, **size)


@pytest.mark.parametrize(
    ("of_trl", "settings"),
    [
        ({"loss_type": "grpo"}, {"aggregation": "seq-mean-token-mean"}),
        ({"loss_type": "grpo", "beta": 0.1}, {"aggregation": "seq-mean-token-mean", "beta": 0.1}),
        ({"loss_type": "grpo", "level": "sequence"}, GSPO),
        ({"loss_type": "dapo"}, {}),
        ({"loss_type": "dapo", "beta": 0.1}, {"beta": 0.1}),
        ({"loss_type": "dr_grpo", "beta": 0.1}, {"aggregation": "constant-length", "beta": 0.1}),
        ({"loss_type": "cispo"}, {"cispo": True}),
    ],
    ids=str,
)
def test_losses_and_gradients_equal_trls(of_trl: dict[str, Any], settings: dict[str, Any]) -> None:
    """With one advantage for all tokens of a rollout, GSPO's token form has the gradient of its sequence form."""
    r = Rollouts()
    theirs, mine = trl_loss(r, **of_trl), ours(r, **settings)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    expected, got = (torch.autograd.grad(loss, r.new)[0] for loss in (theirs, mine))
    torch.testing.assert_close(got, expected * r.mask, rtol=0, atol=1e-12)


def test_the_dual_clip_equals_verls() -> None:
    """verl's `clip_ratio_c`, 3.0 by default, bounds the loss of tokens with a negative advantage."""
    r = Rollouts()
    r.new = (r.old + 3).requires_grad_()
    rho = (r.new - r.old).exp()
    clipped = torch.maximum(-r.a * rho, -r.a * rho.clamp(0.8, 1.28))
    bounded = torch.where(r.a < 0, torch.minimum(-3.0 * r.a, clipped), clipped)
    assert (bounded != clipped)[r.mask].any()
    loss = clipped_surrogate(r.new, r.old, r.a, r.mask, dual_clip=3.0).loss
    torch.testing.assert_close(loss, bounded[r.mask].mean(), rtol=0, atol=1e-12)


def test_with_the_sequence_ratio_token_advantages_keep_their_effect() -> None:
    """The plain gradient of the sequence's ratio would be the same for all of a rollout's tokens."""
    r = Rollouts(rows=2)
    r.new = r.old.clone().requires_grad_()
    advantages = torch.arange(18.0, dtype=torch.float64).reshape(2, 9)
    loss = clipped_surrogate(r.new, r.old, advantages, torch.ones(2, 9), **GSPO).loss
    (gradient,) = torch.autograd.grad(loss, r.new)
    torch.testing.assert_close(gradient, -advantages / 18)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sequence ratio": lambda new, old, ref, a, mask: clipped_surrogate(new, old, a, mask, **GSPO).loss,
    "CISPO": lambda new, old, ref, a, mask: cispo_surrogate(new, old, a, mask, 0.28).loss,
    "KL": lambda new, old, ref, a, mask: reference_kl(new, ref, mask),
    "constant length": lambda new, old, ref, a, mask: (
        clipped_surrogate(new, old, a, mask, aggregation="constant-length", length=16).loss
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_padding_and_the_order_of_the_rollouts_change_no_loss(name: str) -> None:
    r = Rollouts()
    tensors = [x.detach() for x in (r.new, r.old, r.ref, r.a, r.mask)]
    plain = LOSSES[name](*tensors)
    padded = [torch.cat([x, torch.full((len(x), 3), 0 if x.dtype == torch.bool else torch.nan)], 1) for x in tensors]
    padded[-1] = padded[-1].bool()
    torch.testing.assert_close(LOSSES[name](*padded), plain)
    torch.testing.assert_close(LOSSES[name](*(x.flip(0) for x in tensors)), plain)


@pytest.mark.parametrize("name", LOSSES)
def test_an_impossible_token_leaves_losses_and_gradients_finite_and_nan_reaches_the_gradient(name: str) -> None:
    r = Rollouts()
    for value, finite in ((-torch.inf, True), (torch.nan, False)):
        new = r.new.detach().clone()
        new[r.mask.nonzero()[0][0], 0] = value
        new.requires_grad_()
        loss = LOSSES[name](new, r.old, r.ref, r.a, r.mask)
        (gradient,) = torch.autograd.grad(loss, new)
        assert bool(gradient.isfinite().all()) == finite
        assert bool(loss.isfinite()) == finite


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": "rollout"}, "ratio is 'rollout'; it has to be one of token, sequence"),
        ({"aggregation": "mean"}, "aggregation is 'mean'; it has to be one of token-mean"),
        ({"aggregation": "constant-length"}, "length is None"),
        ({"aggregation": "constant-length", "length": 0}, "length is 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    r = Rollouts()
    with pytest.raises(ValueError, match=message):
        clipped_surrogate(r.new, r.old, r.a, r.mask, **settings)
