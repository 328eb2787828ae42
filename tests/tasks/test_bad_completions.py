"""Adversarial completions in the real worker processes; benchmarks/bad_completions.py judges thousands."""

from __future__ import annotations

import sys

import pytest

from benchmarks import bad_completions
from rlrt_lightning.tasks.verifier import Verifier


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_adversarial_completions_run_no_code_and_are_never_judged_correct():
    trap = bad_completions.Trap()
    judges = bad_completions.tasks()
    cases = list(bad_completions.cases(40, seed=1, canary=str(trap.file), port=trap.port))
    assert len({case.kind for case in cases}) == len(bad_completions.KINDS) + 1
    with Verifier(judges["math"], workers=2, timeout_s=0.5, memory_gb=1.0) as first, bad_completions.Memory() as memory:
        verifiers = {name: first.for_task(task) for name, task in judges.items()}
        futures = [verifiers[case.task].submit(case.problem, case.completion) for case in cases]
        verdicts = [future.result(timeout=120) for future in futures]
    for case, verdict in zip(cases, verdicts, strict=True):
        assert verdict.correct == case.right or verdict.fault, case  # on a busy machine a correct one may time out
        assert not (verdict.correct and not case.right), case
    assert sum(verdict.correct for verdict in verdicts) >= 1
    assert not trap.triggered()
    trap.close()
    faults = {verdict.message for verdict in verdicts if verdict.fault}
    assert all("time limit of 0.5 s" in fault or fault.startswith("MemoryError") for fault in faults), faults
    assert memory.peak < 2e9
