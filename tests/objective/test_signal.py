"""The log-probs that D_t is computed from, from the sampler to the picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from rlrt_lightning import ConfigError, LastDigit, Policy, Sampling, TransformersEngine
from rlrt_lightning.callbacks import ReversedSignalLogger
from rlrt_lightning.epoch.record import EpochRecord
from rlrt_lightning.policy.padding import pad_rows
from tests.helpers.epochs import fit_and_record

NUMBERS = re.compile(r"D (\S+)   log P_S (\S+)   log P_T (\S+) ")


class ScoringEngine(TransformersEngine):
    """Samples and scores in bfloat16, so its log-probs differ from the trainer's."""

    def __init__(self) -> None:
        super().__init__(dtype="bfloat16")

    def score(self, sequences: Sequence[tuple[list[int], list[int]]], temperature: float = 1.0) -> list[torch.Tensor]:
        assert self._copy is not None
        own = Policy()
        own.adopt(self._copy)
        return own.score(sequences, temperature)


def run_epoch(folder: Path, scored_by: Literal["trainer", "engine"], **settings: Any) -> tuple[EpochRecord, str]:
    """Trains one epoch; its record, and the page that shows it."""
    settings = {"prompts_per_epoch": 32, "rollouts_per_prompt": 8, "rescore": True, **settings}
    picture = ReversedSignalLogger(picture_every_n_epochs=1)
    recorder, _ = fit_and_record(
        folder, LastDigit(), engine=ScoringEngine(), scored_by=scored_by, callbacks=[picture], **settings
    )
    return recorder.epochs[0], (folder / "signal" / "epoch-1.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def epochs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[EpochRecord, str]]:
    """By scorer."""
    return {
        "trainer": run_epoch(tmp_path_factory.mktemp("trainer"), "trainer"),
        "engine": run_epoch(tmp_path_factory.mktemp("engine"), "engine"),
    }


@pytest.mark.parametrize("scored_by", ["trainer", "engine"])
def test_both_terms_of_the_asymmetry_come_from_the_same_scorer(
    scored_by: str, epochs: dict[str, tuple[EpochRecord, str]]
) -> None:
    epoch, _ = epochs[scored_by]
    scored = epoch.mask & epoch.has_context[:, None]
    assert scored.sum() > 50
    sampler = pad_rows([r.logp_sampler for r in epoch.rollouts])
    policy = pad_rows([r.logp_policy for r in epoch.rollouts], sampler.shape[1])
    assert (sampler - policy)[scored].abs().max() > 1e-3, "the two must differ for this test"
    assert torch.equal(epoch.logp_old[scored], policy[scored]), "the surrogate uses the trainer's log-probs"
    assert torch.equal(epoch.logp_student[scored], (sampler if scored_by == "engine" else policy)[scored])
    assert torch.equal(epoch.credit.asymmetry[scored], (epoch.logp_student - epoch.logp_teacher)[scored])


@pytest.mark.parametrize("scored_by", ["trainer", "engine"])
def test_the_log_probs_in_the_picture_subtract_to_its_asymmetry(
    scored_by: str, epochs: dict[str, tuple[EpochRecord, str]]
) -> None:
    epoch, page = epochs[scored_by]
    shown = NUMBERS.findall(page)
    assert len(shown) > 10
    for asymmetry, student, teacher in shown:
        assert Decimal(asymmetry) == Decimal(student) - Decimal(teacher)
    scored = epoch.credit.asymmetry[epoch.mask & epoch.has_context[:, None]]
    for asymmetry, _, _ in shown:
        assert (scored - float(asymmetry)).abs().min() < 2e-4


def test_rescoring_leaves_the_samplers_log_probs_unchanged(
    tmp_path: Path, epochs: dict[str, tuple[EpochRecord, str]]
) -> None:
    plain, _ = run_epoch(tmp_path, "engine", rescore=False)
    rescored, _ = epochs["engine"]
    assert all(r.logp_policy is None for r in plain.rollouts)
    for a, b in zip(plain.rollouts, rescored.rollouts, strict=True):
        assert a.response_ids == b.response_ids
        assert torch.equal(a.logp_sampler, b.logp_sampler)
    assert torch.equal(plain.logp_student, rescored.logp_student)
    assert torch.equal(plain.logp_old, plain.logp_student)


class LogpAfterTruncation(ScoringEngine):
    cuts_before_logp = True


def test_an_engine_with_truncated_log_probs_cannot_score_for_the_teacher(tmp_path: Path) -> None:
    """Its log-probs would be of the truncated distribution for the student, and of the full one for the teacher."""
    parts: dict[str, Any] = {"engine": LogpAfterTruncation(), "scored_by": "engine", "rescore": True}
    with pytest.raises(ConfigError, match=r"model\.teacher\.scored_by is engine, but data\.sampling cuts"):
        fit_and_record(tmp_path, LastDigit(), sampling=Sampling(max_new_tokens=8, top_p=0.9), **parts)
