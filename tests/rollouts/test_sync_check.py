"""The check after a sync, with simulated syncs and with the policy only; without vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlrt_lightning import LoRA, Policy
from rlrt_lightning.rollouts.sync_check import (
    Measured,
    Probe,
    checksum,
    deviating,
    incomplete,
    policy_log_probs,
    skipped,
    weights_rounded,
)

NOISE = json.loads(Path(__file__).with_name("bf16_noise.json").read_text())
"""Measured differences in nats of vLLM in bfloat16 ("engine") and of the policy in bfloat16 autocast ("policy"), both
with a bfloat16 head, from the policy in float32 with bfloat16 weights. SmolLM2-135M-Instruct, 272 tokens of 8 prompts,
on a CPU with AVX512-BF16."""

SEQUENCES = [([2, 3, 4, 5], [6, 7, 8, 9]), ([5, 2], [3, 4, 6])]


def noise(kind: str, n: int, g: torch.Generator) -> Tensor:
    values = torch.tensor(NOISE[kind])
    return values[torch.randint(len(values), (n,), generator=g)]


def measured(exact: Tensor, g: torch.Generator, engine: Tensor | None = None) -> Measured:
    """A sync after which the engine has the log-probs `engine`, or the policy's if None, plus rounding."""
    n = len(exact)
    loaded = exact if engine is None else engine
    return Measured(loaded + noise("engine", n, g), exact + noise("policy", n, g), exact)


@pytest.mark.parametrize("tokens", [60, 500])
def test_a_thousand_complete_syncs_raise_no_error(tokens: int) -> None:
    """50 runs of 20 syncs. Steps have all sizes, and log-probs drift by up to 0.5 nats."""
    g = torch.Generator().manual_seed(tokens)
    for run in range(50):
        exact = -torch.rand(tokens, generator=g) * 3
        first = before = measured(exact, g)
        step = 10 ** (-4 + 3 * run / 50)
        for _ in range(20):
            exact = exact + step * torch.randn(tokens, generator=g)
            after = measured(exact, g)
            assert skipped(before, after) is None
            assert incomplete(first, after) is None
            assert deviating(first, after, "bfloat16") is None
            before = after


@pytest.mark.parametrize("rollouts", [1, 4])
def test_a_few_short_rollouts_stay_within_the_limit(rollouts: int) -> None:
    g = torch.Generator().manual_seed(rollouts)
    for _ in range(1000):
        after = measured(-torch.rand(8 * rollouts, generator=g), g)
        assert float(after.difference.mean()) <= after.limit("bfloat16")


def test_a_skipped_sync_is_detected_at_any_size_of_the_update() -> None:
    g = torch.Generator().manual_seed(0)
    exact = -torch.rand(100, generator=g)
    before = measured(exact, g)
    for step in (0.0, 1e-3, 1.0):
        after = measured(exact + step * torch.randn(100, generator=g), g)
        again = Measured(before.engine, after.rounded, after.exact)
        assert "changed by 0 nats, while the policy's changed by" in (skipped(before, again) or "")
        unknown = Measured(before.engine, after.rounded, None)
        assert skipped(before, unknown) is not None
    assert skipped(before, before) is None, "the same weights"


@pytest.mark.parametrize("share", [0.0, 0.7])
def test_missing_weights_are_detected_once_their_share_exceeds_the_noise(share: float) -> None:
    """With 500 tokens a mean has an error of 0.04 / sqrt(500) nats; the missing part has to be six times as large."""
    g = torch.Generator().manual_seed(1)
    exact = -torch.rand(500, generator=g) * 3
    first = measured(exact, g)
    found = []
    for size in (0.0, 1e-3, 0.1, 0.5):
        change = size * torch.randn(500, generator=g)
        after = measured(exact + change, g, exact + share * change)
        found.append(incomplete(first, after) is not None)
    assert found == [False, False, True, True]


def test_in_float32_small_differences_are_detected_and_rounding_is_ignored() -> None:
    exact = torch.zeros(100)
    first, rounding = Measured(exact + 2e-6, exact, exact), Measured(exact - 1e-5, exact, exact)
    assert deviating(first, rounding, "float32") is None
    assert deviating(first, Measured(exact + 3e-5, exact, exact), "float32") is not None
    assert deviating(first, Measured(exact * torch.nan, exact, exact), "float32") is not None


def test_without_a_float32_reference_the_limit_is_fixed() -> None:
    own = torch.zeros(1000)
    assert Measured(own, own, None).limit("bfloat16") == pytest.approx(0.161)
    assert Measured(own, own, own).limit("bfloat16") == pytest.approx(0.021)
    assert Measured(own, own, own).limit("float32") == 1e-4


def test_the_reference_has_weights_rounded_to_the_engines_dtype_and_leaves_the_policys_unchanged() -> None:
    policy = Policy()
    policy.load()
    before = {name: weight.clone() for name, weight in policy.model.state_dict().items()}
    rounded, exact = policy_log_probs(policy, SEQUENCES, "bfloat16")
    assert exact is not None
    assert 0 < float((rounded - exact).abs().mean()) < 0.1
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.copy_(weight.bfloat16())
    torch.testing.assert_close(torch.cat(policy.score(SEQUENCES)), exact, rtol=0, atol=1e-5)
    same, also = policy_log_probs(policy, SEQUENCES, "float32")
    assert same is also


def test_rounded_weights_are_restored_after_an_error() -> None:
    policy = Policy()
    policy.load()
    weight = next(iter(policy.model.parameters()))
    before = weight.clone()
    with pytest.raises(IndexError), torch.no_grad(), weights_rounded(policy.model, torch.bfloat16):
        policy.model(input_ids=torch.tensor([[10**6]]))
    assert torch.equal(weight, before)


def test_merged_adapters_and_weights_in_half_precision_have_no_float32_reference() -> None:
    for policy in (Policy(lora=LoRA(rank=2)), Policy(dtype="bfloat16"), Policy()):
        policy.load()
        if policy.dtype == "float32" and policy.lora is None:
            policy.model.bfloat16()  # as --trainer.precision=bf16-true does
        assert policy_log_probs(policy, SEQUENCES, "bfloat16")[1] is None


def test_the_reference_of_separate_adapters_has_them_rounded_like_the_weights() -> None:
    policy = Policy(lora=LoRA(rank=2))
    policy.load()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.requires_grad:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=g))
    _, exact = policy_log_probs(policy, SEQUENCES, "bfloat16", merged=False)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.copy_(weight.bfloat16())
    assert exact is not None
    torch.testing.assert_close(torch.cat(policy.score(SEQUENCES)), exact, rtol=0, atol=1e-5)


def test_a_probe_compares_common_beginnings_once() -> None:
    probe = Probe.of([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4], [7], [2, 3]])
    assert probe.sequences == [([1], [2, 3, 4]), ([1], [2, 3, 5]), ([2], [3])]
    assert probe.chosen.tolist() == [True, True, True, False, False, True, True]


def test_checksums_differ_after_the_change_of_one_bit() -> None:
    weight = torch.randn(50, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    other = weight.clone()
    other.view(torch.int16)[3, 4] += 1  # the last bit
    assert not torch.equal(checksum(weight), checksum(other))
    assert torch.equal(checksum(weight.t().contiguous().t()), checksum(weight))
