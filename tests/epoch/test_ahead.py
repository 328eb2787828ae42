"""Rollouts of the next epoch, drawn while the current one trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlrt_lightning import ConfigError, LastDigit, Policy, Rollout, Sampling, TransformersEngine
from tests.helpers.command_line import cli_exit_code, scalars
from tests.helpers.epochs import fit_and_record


class OwnModelEngine(TransformersEngine):
    """Samples with its own copy of the model, so it can draw while the policy trains.

    It records one parameter of each round's weights.

    Args:
        fails_in_round: The round, from 0, in which it fails after some rollouts.
    """

    beside_training = True

    def __init__(self, fails_in_round: int | None = None) -> None:
        super().__init__()
        self.fails_in_round = fails_in_round
        self.rounds: list[torch.Tensor] = []

    def sync(self, policy: Policy) -> None:
        own = Policy()
        own.adopt(copy.deepcopy(policy.model))
        super().sync(own)

    def generate(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[Rollout]:
        assert self._policy is not None
        self.rounds.append(next(self._policy.model.parameters()).detach().clone())
        for group, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            if group and len(self.rounds) - 1 == self.fails_in_round:
                raise ConfigError("the server is gone")
            # A list, since gradients must not stay disabled in the training thread while a generator is suspended.
            for rollout in list(super().generate([prompt], n, sampling, [seed])):
                rollout.group = group
                yield rollout


AHEAD: dict[str, Any] = {"ahead": True, "rescore": True, "prompts_per_epoch": 8, "rollouts_per_prompt": 8}


def test_each_epoch_is_drawn_with_the_weights_before_the_last_updates(tmp_path: Path) -> None:
    engine = OwnModelEngine()
    recorder, _ = fit_and_record(tmp_path, LastDigit(), epochs=3, engine=engine, **AHEAD)
    assert len(engine.rounds) == 3, "nothing is drawn after the last epoch"
    first, second, third = engine.rounds
    assert torch.equal(first, second), "the second epoch is drawn before the first update"
    assert not torch.equal(second, third)
    plain, _ = fit_and_record(tmp_path, LastDigit(), epochs=3, engine=OwnModelEngine(), **{**AHEAD, "ahead": False})
    for ahead, now in zip(recorder.epochs, plain.epochs, strict=True):
        assert [p.id for p in ahead.problems] == [p.id for p in now.problems], "the same prompts in the same order"
    (ahead, now) = (recorder.epochs[1], plain.epochs[1])
    apart = [
        max(float((r.logp_policy - r.logp_sampler).abs().max()) for r in epoch.rollouts if r.logp_policy is not None)
        for epoch in (ahead, now)
    ]
    assert apart[0] > 1e-3, "drawn with older weights, and corrected"
    assert apart[1] < 1e-4


def test_an_engine_error_while_drawing_ahead_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the server is gone"):
        fit_and_record(tmp_path, LastDigit(), epochs=3, engine=OwnModelEngine(fails_in_round=1), **AHEAD)


@pytest.mark.slow
def test_a_resumed_run_trains_on_the_rollouts_drawn_ahead(tmp_path: Path) -> None:
    flags = ["--data.engine=tests.epoch.test_ahead.OwnModelEngine", "--data.ahead=true", "--data.rescore=true"]
    flags += ["--checkpoint.save_top_k=-1", "--trainer.max_epochs=3"]
    assert cli_exit_code("fit", tmp_path, *flags) == 0
    saved = tmp_path / "last-digit" / "rlrt-0" / "checkpoints" / "epoch-0.ckpt"
    assert cli_exit_code("fit", tmp_path, *flags, f"--ckpt_path={saved}") == 0
    whole, resumed = scalars(tmp_path), scalars(tmp_path, 1)
    for tag in ("train/loss", "rollout/reward", "rollout/mismatch_mean", "eval/heldout/avg@8", "train/grad_norm"):
        assert len(resumed[tag]) in (1, 2), tag
        assert set(resumed[tag]) <= set(whole[tag]), tag


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": TransformersEngine()}, "TransformersEngine cannot generate while the policy trains"),
        ({"engine": OwnModelEngine(), "rescore": False}, "data.rescore=true"),
    ],
)
def test_ahead_without_a_suitable_engine_or_rescoring_is_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"data.ahead is true, but .*{message}"):
        fit_and_record(tmp_path, LastDigit(), **{**AHEAD, **settings})
