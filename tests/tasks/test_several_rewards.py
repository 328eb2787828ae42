"""Several rewards by name: their weighted sum, the one that decides about correctness, and their metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlrt_lightning import ConfigError, DatasetTask, ExactMatch, MathReward, Problem, Verdict
from rlrt_lightning.resume import of_object
from rlrt_lightning.tasks.verifier import Verifier
from tests.helpers.command_line import TRAIN_ONLY, cli_exit_code, scalars

PROBLEM = Problem("p", "2+2?", "4")


def short(problem: Problem, completion: str) -> float:
    return float(len(completion) < 20)


def labels(problem: Problem, completion: str) -> Verdict:
    return Verdict(2.0, True, label="polite" if "please" in completion else None)


def fails(problem: Problem, completion: str) -> float:
    raise KeyError("no such row")


def broken(problem: Problem, completion: str) -> Verdict:
    return Verdict(1.0, True, message="no ground truth", fault=True)


def task(rewards: dict[str, Any], **settings: Any) -> DatasetTask:
    return DatasetTask(train="a.jsonl", reward=rewards, **settings)


def test_the_reward_is_the_weighted_sum_and_the_first_one_decides_about_correctness() -> None:
    found = task({"math": MathReward(), "short": short, "labels": labels}, reward_weights={"short": 0.25, "labels": -1})
    right = found.verify(PROBLEM, r"\boxed{4}, please")
    assert right.rewards == {"math": 1.0, "short": 1.0, "labels": 2.0}
    assert right.reward == 1 + 0.25 - 2
    assert (right.correct, right.answer, right.message, right.label) == (True, "4", "right", "polite")
    wrong = found.verify(PROBLEM, r"it is clearly \boxed{5}")
    assert (wrong.reward, wrong.correct, wrong.label) == (-2.0, False, None)
    assert wrong.rewards == {"math": 0.0, "short": 0.0, "labels": 2.0}


def test_correct_by_names_the_reward_that_decides() -> None:
    found = task({"short": short, "exact": ExactMatch()}, correct_by="exact")
    assert not found.verify(PROBLEM, "5").correct
    assert found.verify(PROBLEM, "4") == Verdict(2.0, True, "4", "right", rewards={"short": 1.0, "exact": 1.0})
    assert task({"short": short, "exact": ExactMatch()}).verify(PROBLEM, "5").correct, "the first, without it"


def test_the_deciding_reward_reads_the_ground_truth(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": "q", "answer": "['4', '']"}) + "\n")
    for rewards, answer in (({"m": MathReward(), "s": short}, "4"), ({"s": short, "m": MathReward()}, "['4', '']")):
        (problem,) = DatasetTask(train=str(file), answer="answer", reward=rewards).problems("train")
        assert problem.answer == answer


@pytest.mark.parametrize("other", [fails, broken])
def test_a_failing_reward_makes_the_completion_wrong(other: Any) -> None:
    with Verifier(task({"exact": ExactMatch(), "other": other}), workers=1) as verifier:
        verdict = verifier.submit(PROBLEM, "4").result()
    assert verdict.fault
    assert (verdict.reward, verdict.correct, verdict.rewards) == (0.0, False, {})
    assert ("no such row" if other is fails else "other: no ground truth") in verdict.message


def test_rewards_run_in_worker_processes_if_one_has_to() -> None:
    assert task({"exact": ExactMatch(), "math": MathReward()}).isolated
    assert not task({"exact": ExactMatch(), "loose": ExactMatch(ignore_case=True)}).isolated


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": {}}, "reward is an empty dict"),
        ({"reward": {"a": short}, "reward_weights": {"b": 1.0}}, "reward_weights has 'b', but the rewards are a"),
        ({"reward": {"a": short}, "reward_weights": {"a": float("nan")}}, "reward_weights: the weight of a is nan"),
        ({"reward": {"a": short, "b": short}, "correct_by": "c"}, "correct_by has 'c', but the rewards are a, b"),
        ({"reward": short, "reward_weights": {"a": 1.0}}, "reward_weights is set, but there is only one reward"),
        ({"correct_by": "a"}, "correct_by is set, but there is only one reward"),
    ],
)
def test_settings_that_do_not_match_the_rewards_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DatasetTask(train="a.jsonl", **settings)


def test_a_checkpoint_records_each_reward_with_its_settings() -> None:
    def recorded(**rewards: Any) -> Any:
        return of_object(task(rewards), "data.task")["data.task.reward"]

    same = recorded(exact=ExactMatch(), short=short)
    assert same == recorded(exact=ExactMatch(), short=short)
    assert same != recorded(exact=ExactMatch("x"), short=short)
    assert same != recorded(exact=ExactMatch(), short=labels)


def test_a_run_from_the_command_line_logs_each_reward_by_name(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"a{i}", "answer": str(i)}) + "\n" for i in range(8)))
    here = "tests.tasks.test_several_rewards"
    config = tmp_path / "rewards.yaml"
    config.write_text(
        "data:\n  task:\n    class_path: DatasetTask\n    init_args:\n"
        f"      train: {file}\n      heldout: {file}\n"
        "      answer: answer\n      reward:\n        exact: ExactMatch\n"
        f"        short: {here}.short\n        labels: {here}.labels\n"
        "      reward_weights: {short: 0.5, labels: 0.1}\n"
    )
    flags = ["--trainer.max_epochs=1", "--data.benchmarks={heldout: {samples: 1}}", *TRAIN_ONLY]
    assert cli_exit_code("fit", tmp_path, *flags, configs=(str(config),)) == 0
    curves = {tag: curve[0][1] for tag, curve in scalars(tmp_path).items()}
    assert curves["rewards/labels"] == 2
    assert 0 < curves["rewards/short"] < 1
    total = curves["rewards/exact"] + 0.5 * curves["rewards/short"] + 0.1 * 2
    assert curves["rollout/reward"] == pytest.approx(total)
    assert curves["rollout/correct"] == curves["rewards/exact"]


def test_an_unknown_reward_in_a_dict_is_refused_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.task=DatasetTask", "--data.task.train=a.jsonl", "--data.task.reward={exact: ExactMatc}"]
    assert cli_exit_code("fit", tmp_path, *flags) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "data.task.reward" in line
