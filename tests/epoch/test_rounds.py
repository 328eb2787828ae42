"""Dynamic sampling, and tasks that learn how their problems fared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlrt_lightning import GRPO, ConfigError, LastDigit, Problem, Rollout, Verdict
from rlrt_lightning.epoch.record import Questions
from rlrt_lightning.epoch.rounds import Source, draw_rounds
from tests.epoch.test_ahead import AHEAD, OwnModelEngine
from tests.helpers.command_line import TRAIN_ONLY, assert_continued, cli_exit_code, scalars
from tests.helpers.epochs import RuleTask, fit_and_record
from tests.runtime.test_stopping import FLAGS, exit_code_of_stopped_run

SIZE = 4


class Drawn:
    """Rounds of 4 problems with 3 rollouts; those with an index in `mixed` get different rewards."""

    def __init__(self, mixed: Sequence[int]) -> None:
        self.mixed = mixed
        self.drawn: list[int] = []
        self.seen: list[tuple[str, list[float]]] = []

    def questions(self, drawn: int) -> Questions:
        indices = range(drawn, drawn + SIZE)
        self.drawn.append(drawn)
        return Questions(7, [Problem(str(i), "") for i in indices], [[i] for i in indices], [*indices], indices)

    def judged(self, questions: Questions) -> list[Rollout]:
        return [
            Rollout(group, k, [], [2] * (k + 1), torch.zeros(k + 1), False, "", verdict=Verdict(reward, bool(reward)))
            for group, index in enumerate(questions.indices)
            for k, reward in enumerate([1.0, 0.0, 1.0] if index in self.mixed else [1.0] * 3)
        ]

    def observe(self, problems: Sequence[Problem], rewards: Sequence[Sequence[float]]) -> None:
        self.seen += [(p.id, list(r)) for p, r in zip(problems, rewards, strict=True)]

    def rounds(self, n: int) -> tuple[list[int], list[Rollout], dict[str, float]]:
        source = Source(self.questions, lambda questions: [], self.observe)
        questions, rollouts, metrics = draw_rounds(source, self.judged, n)
        assert questions.epoch == 7
        assert [p.id for p in questions.problems] == [str(i) for i in questions.indices]
        assert questions.prompts == [[i] for i in questions.indices]
        assert questions.seeds == list(questions.indices)
        assert [r.group for r in rollouts] == [g for g in range(SIZE) for _ in range(3)]
        return list(questions.indices), rollouts, metrics


def test_rounds_are_drawn_until_the_epoch_has_its_share_of_mixed_groups() -> None:
    source = Drawn(mixed=[1, 4, 6, 9, 10, 11])
    used, rollouts, metrics = source.rounds(5)
    assert source.drawn == [0, 4, 8], "no more rounds than needed"
    assert used == [1, 4, 6, 9], "the first ones; the surplus is dropped"
    assert [r.verdict.reward for r in rollouts if r.verdict] == [1.0, 0.0, 1.0] * SIZE
    assert (metrics["groups/rounds"], metrics["groups/drawn"], metrics["groups/missing"]) == (3, 12, 0)
    assert metrics["groups/mixed"] == pytest.approx(6 / 12), "of all groups drawn"
    assert [name for name, _ in source.seen] == [str(i) for i in range(12)], "the task sees dropped groups too"


def test_too_few_mixed_groups_after_the_last_round_are_filled_up_in_order() -> None:
    source = Drawn(mixed=[2, 5])
    used, _, metrics = source.rounds(2)
    assert used == [0, 1, 2, 5]
    assert (metrics["groups/rounds"], metrics["groups/drawn"], metrics["groups/missing"]) == (2, 8, 2)


def test_one_round_uses_all_groups() -> None:
    source = Drawn(mixed=[1])
    used, _, metrics = source.rounds(1)
    assert used == [0, 1, 2, 3]
    assert "groups/rounds" not in metrics


# -- runs ----------------------------------------------------------------------------------------------------------


def rarely(text: str) -> bool:
    return len(text) > 30


def test_an_epoch_of_mixed_groups_continues_the_prompts_and_keeps_its_seeds(tmp_path: Path) -> None:
    """The first round is that of a run without dynamic sampling, and no prompt is drawn twice in a pass."""
    task = RuleTask(rarely, size=40)
    plain, _ = fit_and_record(tmp_path, task, method=GRPO(), prompts_per_epoch=6)
    recorder, _ = fit_and_record(tmp_path, task, 2, GRPO(), prompts_per_epoch=6, sampling_rounds=6)
    first, second = recorder.epochs
    metrics = recorder.metrics[0]
    assert plain.metrics[0]["groups/mixed"] < 1
    assert metrics["groups/rounds"] > 1
    assert metrics["groups/missing"] == 0
    assert all(len(set(first.rewards[first.groups == g].tolist())) == 2 for g in range(6))
    kept = {p.id: [r.text for r in first.rollouts if r.group == g] for g, p in enumerate(first.problems)}
    for g, problem in enumerate(plain.epochs[0].problems):
        if problem.id in kept:
            assert kept[problem.id] == [r.text for r in plain.epochs[0].rollouts if r.group == g]
    drawn = 6 * (metrics["groups/rounds"] + recorder.metrics[1]["groups/rounds"])
    repeated = Counter(p.id for epoch in (first, second) for p in epoch.problems)
    assert drawn > 40 or max(repeated.values()) == 1
    assert len(set(first.questions.seeds) & set(second.questions.seeds)) == 0


class Ladder(LastDigit):
    """Leaves out problems of which a rollout was correct."""

    def __init__(self, heldout: int = 8) -> None:
        super().__init__(heldout=heldout)
        self.solved: list[str] = []

    def observe(self, problems: Sequence[Problem], rewards: Sequence[Sequence[float]]) -> None:
        self.solved += [p.id for p, r in zip(problems, rewards, strict=True) if max(r) == 1]

    def admits(self, problem: Problem) -> bool:
        return problem.id not in self.solved

    def state_dict(self) -> dict[str, Any]:
        return {"solved": self.solved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.solved = list(state["solved"])


class OnceOnly(RuleTask):
    """Leaves out problems that it has seen."""

    def observe(self, problems: Sequence[Problem], rewards: Sequence[Sequence[float]]) -> None:
        self.seen = [*getattr(self, "seen", []), *(p.id for p in problems)]

    def admits(self, problem: Problem) -> bool:
        return problem.id not in getattr(self, "seen", [])


def test_problems_are_left_out_until_none_is_left(tmp_path: Path) -> None:
    task = OnceOnly(rarely, size=10)
    with pytest.raises(ConfigError, match=r"data\.task: its `admits` leaves out all 10 problems"):
        fit_and_record(tmp_path, task, epochs=9, prompts_per_epoch=2)
    assert sorted(task.seen) == sorted(f"p{i}" for i in range(10)), "each was drawn once"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"sampling_rounds": 2}, "set data.sampling_rounds=1"), ({"task": Ladder()}, "Ladder chooses the next epoch's")],
    ids=["dynamic sampling", "curriculum"],
)
def test_rollouts_are_not_drawn_ahead_if_their_prompts_depend_on_rewards(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"data.ahead is true, but .*{message}"):
        fit_and_record(tmp_path, **{"task": LastDigit(), "engine": OwnModelEngine(), **AHEAD, **settings})


@pytest.mark.slow
def test_a_run_with_rounds_a_curriculum_and_a_reference_resumes_exactly(tmp_path: Path) -> None:
    """Stopped while drawing, and between two updates of an epoch."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["--data.task=tests.epoch.test_rounds.Ladder", "--data.sampling_rounds=3", "--data.overlong_buffer=8"]
    flags += ["--model.reference_kl=0.1", "--model.mask_truncated=true", "--model.aggregation=constant-length"]
    flags += ["--model.optimizer.lr=1e-2", "--trainer.max_epochs=2", *TRAIN_ONLY]
    assert cli_exit_code("fit", whole, *FLAGS, *flags) == 0
    for i, phase in enumerate(("rollout", "update")):
        assert exit_code_of_stopped_run(cut, phase, *flags, *(["--ckpt_path=last"] if i else [])) == 143
    assert cli_exit_code("fit", cut, *FLAGS, *flags, "--ckpt_path=last") == 0
    assert_continued(cut, whole)
    curves = scalars(whole)
    assert max(rounds for _, rounds in curves["groups/rounds"]) > 1
    assert curves["train/reference_kl"][-1][1] > 0
    (last,) = whole.glob("**/last.ckpt")
    saved = torch.load(last, weights_only=True)
    assert saved["RolloutDataModule"]["task"]["solved"]
    trained, initial = (saved["state_dict"][f"{whose}.model.model.norm.weight"] for whose in ("policy", "reference"))
    assert not torch.equal(trained, initial), "the checkpoint has the initial weights beside the trained ones"
