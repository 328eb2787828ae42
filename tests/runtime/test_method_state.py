"""Runs of methods whose state lasts from epoch to epoch resume exactly: AntiSD's gate, RLCSD's copy of the policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.command_line import TRAIN_ONLY, assert_continued, cli_exit_code, runs_in, scalars, without_timings

METHODS = {
    "AntiSD": ["--model.method.warmup_steps=2", "--model.method.close_at=1.0"],
    "RLCSD": ["--model.method.tau=0.5", "--model.method.lam_warmup_steps=3", "--teacher_refresh.every_n_epochs=2"],
}
SENDS = "--trainer.callbacks+=tests.runtime.test_stopping.Sends"


def flags_of(method: str) -> list[str]:
    return [
        f"--model.method={method}",
        *METHODS[method],
        *TRAIN_ONLY,
        "--trainer.max_epochs=4",
        "--trainer.accumulate_grad_batches=2",
    ]


@pytest.mark.parametrize("method", ["AntiSD", pytest.param("RLCSD", marks=pytest.mark.slow)])
def test_a_run_stopped_within_and_between_epochs_continues_exactly(method: str, tmp_path: Path) -> None:
    """Stopped in the second epoch while the teacher scores and in an update, which is in the warm-up of the gate, to
    which an epoch that is made again counts once; then after the third epoch."""
    whole, cut, flags = tmp_path / "whole", tmp_path / "cut", flags_of(method)
    assert cli_exit_code("fit", whole, *flags) == 0
    for i, phase in enumerate(("teacher", "update")):
        resume = ["--ckpt_path=last"] if i else []
        with pytest.raises(SystemExit) as end:
            cli_exit_code("fit", cut, SENDS, f"--trainer.callbacks.phase={phase}", *flags, *resume)
        assert end.value.code == 143
    assert cli_exit_code("fit", cut, *flags, "--trainer.max_epochs=3", "--ckpt_path=last") == 0
    assert cli_exit_code("fit", cut, *flags, "--ckpt_path=last") == 0
    assert_continued(cut, whole)
    if method == "AntiSD":
        gate = [value for _, value in scalars(whole)["signal/gate_open"]]
        assert gate[:2] == [0, 0]
        state = torch.load(runs_in(cut)[0] / "checkpoints" / "last.ckpt", weights_only=True)["gate"]
        entropies = [value for _, value in scalars(whole)["signal/gate_entropy"]]
        assert state["warmup"] == pytest.approx(entropies[:2])
        assert state["closed"] == (gate[-1] == 0)


@pytest.mark.slow
def test_the_gate_resumes_with_rollouts_drawn_ahead(tmp_path: Path) -> None:
    flags = [*flags_of("AntiSD"), "--data.engine=tests.epoch.test_ahead.OwnModelEngine", "--data.ahead=true"]
    flags += ["--data.rescore=true", "--checkpoint.save_top_k=-1"]
    assert cli_exit_code("fit", tmp_path, *flags) == 0
    saved = runs_in(tmp_path)[0] / "checkpoints" / "epoch-1.ckpt"
    assert cli_exit_code("fit", tmp_path, *flags, f"--ckpt_path={saved}") == 0
    whole, resumed = (without_timings(scalars(tmp_path, version)) for version in (0, 1))
    for tag in ("signal/gate_open", "signal/gate_entropy", "signal/gate_warm_entropy", "train/grad_norm"):
        assert resumed[tag] == whole[tag][-2:], tag
