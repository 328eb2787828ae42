"""Every method of the paper from the command line, and one of a user's own."""

from __future__ import annotations

import importlib
import json
import logging
import re
import sys
from pathlib import Path

import pytest
import torch

from rlrt_lightning.padding import pad_sequences
from tests.test_fit import ROOT, command, scalars
from tests.tiny import policy

SETTINGS = {
    "grpo": "GRPO(normalize_std=False)",
    "grpo_entropy": "EntropyBonus(normalize_std=False, coef=0.001)",
    "rlrt": "RLRT(lam=0.5, eps_w=1.0, gated=True",
    "rlrt_all": "RLRT(lam=0.5, eps_w=1.0, gated=False",
    "rlsd": "RLSD(lam=0.5, eps_w=0.2, gated=False, success_threshold=0.5, context='answer'",
    "teacher_predicted": "RLSD(lam=0.5, eps_w=1.0, gated=True, success_threshold=0.5, context='sibling'",
    "sdpo": "SDPO(alpha=0.5, top_k=100, importance_cap=2.0, context='sibling'",
    "srpo": "SRPO(beta=1.0, alpha=0.5, top_k=100, importance_cap=2.0, context='sibling'",
    "diver": "DIVER(normalize_std=False, scale=0.1, cap=1.0, diversity='bleu', tokenize='13a', steps=100",
}


def test_each_method_has_a_config() -> None:
    assert set(SETTINGS) == {path.stem for path in (ROOT / "configs" / "methods").glob("*.yaml")}


@pytest.mark.parametrize("name", SETTINGS)
def test_each_method_trains_from_the_command_line(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    flags = ("--trainer.max_epochs=3", "--data.rollouts_per_prompt=8", "--trainer.enable_checkpointing=false")
    assert command("fit", tmp_path, *flags, configs=(f"configs/methods/{name}.yaml",)) == 0
    assert SETTINGS[name] in caplog.text, "the effective settings stand in the log"
    curves = scalars(tmp_path)
    for tag in ("train/loss", "train/grad_norm"):
        values = torch.tensor([value for _, value in curves[tag]])
        assert torch.isfinite(values).all()
        assert values.abs().max() > 0
    assert ("train/divergence" in curves) == (name in ("sdpo", "srpo"))
    assert ("signal/context" in curves) == (name not in ("grpo", "grpo_entropy", "diver"))
    shaped = [v for _, v in curves["rollout/shaped_reward"]] != [v for _, v in curves["rollout/reward"]]
    assert shaped == (name == "diver")


def test_the_readmes_own_method_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (code,) = re.findall(r"(    # my_method\.py\n(?:    .*\n|\n)+)", (ROOT / "README.md").read_text())
    lines = [line.removeprefix("    ") for line in code.rstrip().splitlines()]
    lines = lines[: next(i for i, line in enumerate(lines) if line.startswith("--"))]
    assert len(lines) < 30
    (tmp_path / "my_method.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    try:
        assert command("fit", tmp_path, "--trainer.max_epochs=1", "--model.method=my_method.FirstTokens") == 0
    finally:
        sys.modules.pop("my_method", None)
    assert "FirstTokens(" in caplog.text


def test_a_context_that_no_problem_has_is_refused_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"a{i}b2", "answer": "3"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = [f"--data.task.{split}={tmp_path / 'rows.jsonl'}" for split in ("train", "heldout")]
    flags = ("--data.task=DatasetTask", *data, "--data.task.answer=answer", "--model.method.context=solution")
    assert command("fit", tmp_path, *flags) == 2
    assert "model.method.context is solution, but none of the first 8" in capsys.readouterr().err


def test_the_logits_of_the_whole_batch_are_never_there_at_once() -> None:
    made = policy()
    made.logits_chunk = 4
    sequences = [([2, 3], [4, 5, 6, 7, 8]), ([2], [9, 10, 11, 12])]
    seen: list[int] = []

    def compute(logits: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(len(logits))
        return (logits.logsumexp(-1),)

    (totals,) = made.from_logits(compute, *pad_sequences(sequences), 1.0)
    totals.sum().backward()
    assert len(totals) == 9
    assert max(seen) == 4
    assert sum(seen) == 2 * 9, "once forward, once more for the gradient"
