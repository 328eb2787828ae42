"""The objective, compared with golden values of an independent reference (tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlrt_lightning.objective import (
    GRPO,
    RLRT,
    RLSD,
    clipped_surrogate,
    divergence,
    dynamic_weights,
    group_advantages,
    pass_at_k,
)
from rlrt_lightning.policy.log_probs import token_log_probs

CASES: list[dict[str, Any]] = [
    case
    for name in ("objective", "methods")
    for case in json.loads((Path(__file__).parents[1] / "golden" / f"{name}.json").read_text(encoding="utf-8"))
]
IN_OTHER_FILES = {"antisd", "antisd_gate", "rlcsd", "gspo", "cispo", "constant_length", "reference_kl", "overlong"}
"""Kinds of cases that test_methods_golden.py and test_surrogates_golden.py check."""


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


def close(actual: Tensor | None, expected: Any) -> None:
    assert actual is not None
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def check_credit(case: dict[str, Any]) -> None:
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
    bounds = p["clip_low"], p["clip_high"], p["dual_clip"], p["aggregation"]
    out = clipped_surrogate(logp_new, t["logp_student"], credit.advantages, mask, *bounds)
    close(out.loss, expect["loss"])
    close(out.clip_fraction, expect["clip_fraction"])
    out.loss.backward()
    close(logp_new.grad, expect["grad_logp_new"])


def check_divergence(case: dict[str, Any]) -> None:
    student, teacher = (torch.tensor(case[f"{who}_logits"], dtype=torch.float64) for who in ("student", "teacher"))
    p, expect = case["params"], case["expect"]
    close(divergence(student, teacher, p["alpha"], p["top_k"]), expect["divergence"])
    _, entropy = token_log_probs(teacher, torch.zeros(len(teacher), dtype=torch.long))
    close(entropy, expect["teacher_entropy"])
    close(dynamic_weights(entropy, torch.ones(len(teacher)), p["beta"]), expect["dynamic_weight"])


def check_pass_at_k(case: dict[str, Any]) -> None:
    for (n, c, k), expected in zip(case["inputs"], case["expect"], strict=True):
        close(pass_at_k(n, c, k), expected)


CHECKS = {"credit": check_credit, "divergence": check_divergence, "pass_at_k": check_pass_at_k}


@pytest.mark.smoke
@pytest.mark.parametrize("case", [c for c in CASES if c["kind"] in CHECKS], ids=lambda c: str(c.get("name", c["kind"])))
def test_results_match_the_golden_values(case: dict[str, Any]) -> None:
    CHECKS[case["kind"]](case)


def test_every_kind_is_checked() -> None:
    assert {case["kind"] for case in CASES} == CHECKS.keys() | IN_OTHER_FILES
