"""AntiSD, its gate, RLCSD and its loss, compared with golden values of an independent reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlrt_lightning import RLCSD, AntiSD, EntropyGate, two_path_surrogate

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "golden" / "methods.json").read_text())


def of_kind(kind: str) -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in CASES if case["kind"] == kind]


def tensors(case: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in case.items() if isinstance(value, list)}


def close(actual: Tensor | None, expected: Any) -> None:
    assert actual is not None
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.smoke
@pytest.mark.parametrize("case", of_kind("antisd"))
def test_antisd(case: dict[str, Any]) -> None:
    """Called directly, it answers as with the gate open."""
    t = tensors(case)
    signals = (t[name] for name in ("logp_student", "logp_teacher", "mask", "has_context"))
    credit = AntiSD(lam=case["params"]["lam"])(t["advantages"], (t["advantages"] > 0).double(), *signals)
    close(credit.advantages, case["expect"]["token_advantage"])
    mask = t["mask"].bool()
    assert (credit.weights == mask).all()
    scored = mask & t["has_context"].bool()[:, None]
    close(credit.asymmetry, torch.where(scored, t["logp_student"] - t["logp_teacher"], 0.0).tolist())


@pytest.mark.smoke
@pytest.mark.parametrize("case", of_kind("antisd_gate"))
def test_antisds_gate(case: dict[str, Any]) -> None:
    gate = EntropyGate(**case["params"])
    found = []
    for entropy in case["entropies"]:
        found.append(gate.step(entropy))
        restored = EntropyGate(**case["params"])
        restored.load_state_dict(json.loads(json.dumps(gate.state_dict())))
        gate = restored
    assert found == [bool(open) for open in case["expect"]["open"]]


@pytest.mark.smoke
@pytest.mark.parametrize("case", of_kind("rlcsd"))
def test_rlcsd_and_its_loss(case: dict[str, Any]) -> None:
    t, expect = tensors(case), case["expect"]
    clip = case["params"]["clip"]
    method = RLCSD(**{name: value for name, value in case["params"].items() if name != "clip"})
    credit = method(
        t["advantages"],
        (t["advantages"] > 0).double(),
        t["logp_student"],
        t["logp_teacher"],
        t["mask"],
        torch.ones(len(t["mask"])),
        logp_teacher_wrong=t["logp_teacher_wrong"],
        wrong_valid=t["wrong_valid"],
    )
    close(credit.contrast, expect["contrast"])
    close(credit.advantages, expect["token_advantage"])
    assert credit.selected is not None
    assert credit.selected.long().tolist() == expect["selected"]
    logp_new = t["logp_new"].requires_grad_()
    old, mask = t["logp_student"], t["mask"]
    out = two_path_surrogate(logp_new, old, credit.advantages, mask, credit.selected, clip, clip, method.eta)
    close(out.loss, expect["loss"])
    out.loss.backward()
    close(logp_new.grad, expect["grad_logp_new"])
