"""The rewards: which answers are equal, which answer of a completion counts, and harmful answers."""

from __future__ import annotations

import numpy as np
import pytest

from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.tasks import DatasetTask, ExactMatch, MathReward, Problem, Verdict
from rlrt_lightning.tasks.rewards import as_verdict, last_boxed
from rlrt_lightning.tasks.verifier import Verifier
from tests.helpers.grader_cases import DISAGREEMENTS, EQUAL, UNEQUAL
from tests.helpers.marks import slow_except


def judge(reward, answer, completion):
    return as_verdict(reward(Problem("p", "question", answer), completion))


COMPLETIONS = [  # completion, whether it is correct (the answer is 5), the extracted answer
    ("so \\boxed{5}", True, "5"),
    ("\\boxed{3}, no: \\boxed{5}", True, "5"),
    ("\\boxed{5}, no: \\boxed{3}", False, "3"),
    ("\\boxed{5} or \\boxed{6} or \\boxed{7}", False, "7"),
    ("<think>\\boxed{3}</think> \\boxed{5}. Done, in 7 steps.", True, "5"),
    ("\\boxed {5}", True, "5"),
    ("\\fbox{5}", True, "5"),
    ("$\\boxed{\\text{5}}$", True, "\\text{5}"),
    ("\\boxed{\\boxed{5}}", True, "5"),
    ("\\boxed{}", False, None),
    ("\\boxed{  }", False, None),
    ("\\boxed{3} and then \\boxed{5", False, "3"),
    ("\\boxed{5", False, None),  # truncated: no answer
    ("The answer is $5$.", True, "5"),
    ("The final answer is 5. I hope it is correct.", True, "5"),
    ("The answer is 6.", False, "6"),
    ("I do not know.", False, None),
    ("", False, None),
    ("}}}{{{", False, None),
    ("\\boxed{5\x00}", False, "5\x00"),
    ("\\boxed" * 100, False, None),
]


@pytest.mark.parametrize("category", EQUAL)
def test_equal_answers_are_judged_correct(category):
    wrong = [pair for pair in EQUAL[category] if not judge_pair(*pair).correct]
    assert wrong == [pair for pair in EQUAL[category] if pair in DISAGREEMENTS]


@pytest.mark.parametrize("category", UNEQUAL)
def test_unequal_malformed_and_adversarial_answers_are_judged_wrong(category):
    verdicts = {pair: judge_pair(*pair) for pair in UNEQUAL[category]}
    assert [pair for pair, verdict in verdicts.items() if verdict.correct] == [
        pair for pair in UNEQUAL[category] if pair in DISAGREEMENTS
    ]
    assert all(verdict.reward == verdict.correct and not verdict.fault for verdict in verdicts.values())


def judge_pair(gold, answer):
    return judge(MathReward(), gold, rf"Hence \boxed{{{answer}}}.")


def test_there_are_at_least_300_distinct_cases():
    pairs = [pair for cases in (EQUAL, UNEQUAL) for of_category in cases.values() for pair in of_category]
    assert len(pairs) == len(set(pairs)) >= 300
    assert set(DISAGREEMENTS) <= set(pairs)


@pytest.mark.parametrize(("completion", "correct", "answer"), COMPLETIONS)
def test_the_last_answer_of_a_completion_counts(completion, correct, answer):
    verdict = judge(MathReward(), "5", completion)
    assert (verdict.correct, verdict.answer) == (correct, answer)
    assert verdict.message == "right" if correct else verdict.message


def test_without_the_fallback_only_a_box_counts():
    assert judge(MathReward(fallback=False), "5", r"\boxed{5}").correct
    verdict = judge(MathReward(fallback=False), "5", "The answer is 5.")
    assert verdict == Verdict(0.0, False, message=r"no \boxed{}")


def test_ground_truths_may_be_numbers_or_lists():
    assert judge(MathReward(), 5, r"\boxed{5}").correct
    assert judge(MathReward(), 0.5, r"\boxed{1/2}").correct
    assert judge(MathReward(), ["4", "5"], r"\boxed{5}").correct
    verdict = judge(MathReward(), ["4", "5"], r"\boxed{6}")
    assert not verdict.correct
    assert verdict.message == "wrong: the answer is 4 or 5"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\\boxed{a{b{c}d}e}", "a{b{c}d}e"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\left\\{x\\right.}", "\\left\\{x\\right."),
        ("}\\boxed{1}", "1"),
        ("{\\boxed{1}", "1"),
        ("\\boxed{a \\boxed{b", None),
        ("\\boxed{a} \\boxed{b", "a"),
        ("\\unboxed{a}", None),
        ("\\boxed{" * 200_000 + "1" + "}" * 200_000, "1"),
    ],
)
def test_last_boxed_finds_the_last_complete_box(text, found):
    assert last_boxed(text) == found


HUGE = [
    "9**9**9**9",
    "9^{9^{9^9}}",
    "9!!!!!!!!!!!",
    "(10^{10})!",
    "2^{10^{12}}",
    "\\sum_{k=1}^{10^{9}} \\sin(k)",
    "(" * 5000,
]


def test_endless_answers_time_out_without_delaying_others():
    with Verifier(DatasetTask(train="unused"), workers=2, timeout_s=1.0, memory_gb=2.0) as verifier:
        problem = Problem("p", "question", "5")
        bad = [verifier.submit(problem, rf"\boxed{{{answer}}}") for answer in HUGE]
        good = [verifier.submit(problem, r"\boxed{\frac{10}{2}}") for _ in range(20)]
        assert not any(future.result(timeout=60).correct for future in bad)
        assert all(future.result(timeout=60).correct for future in good)


@pytest.mark.parametrize("step", slow_except([1, 5], 5))
def test_math500_reference_solutions_are_judged_correct(shared, step):
    task = DatasetTask(heldout=str(shared / "data" / "math500.parquet"), solution="extra_info.solution")
    problems = list(task.problems("heldout"))[::step]
    with Verifier(task, workers=2) as verifier:
        right = [verifier.submit(problem, problem.solution) for problem in problems]
        # The same answers written differently, so that they have to be parsed, and answers of other problems.
        same = [verifier.submit(problem, rf"\boxed{{{problem.answer} + 0}}") for problem in problems]
        others = [
            verifier.submit(p, rf"\boxed{{{q.answer}}}")
            for p, q in zip(problems, [*problems[1:], problems[0]], strict=True)
        ]
        assert sum(future.result(timeout=60).correct for future in right) == len(problems) == 500 / step
        # After some answers + 0 is invalid.
        assert sum(future.result(timeout=60).correct for future in same) >= 0.9 * len(problems)
        right_by_chance = [future for future in others if future.result(timeout=60).correct]
        assert len(right_by_chance) <= 0.01 * len(problems)


@pytest.mark.parametrize(
    ("settings", "completion", "correct", "answer"),
    [
        ({}, " Paris\n", True, "Paris"),
        ({}, "paris", False, "paris"),
        ({"ignore_case": True}, "PARIS", True, "PARIS"),
        ({"pattern": "#(.*)"}, "#Rome #Paris", False, "Rome #Paris"),
        ({"pattern": "#([^#]*)"}, "#Rome #Paris", True, "Paris"),
        ({"pattern": "[A-Z][a-z]+"}, "Rome, Paris", True, "Paris"),
        ({"pattern": "(Rome)|Paris"}, "Paris", False, None),
        ({"pattern": "#(.*)"}, "Paris", False, None),
    ],
)
def test_exact_match_compares_the_stripped_or_extracted_text(settings, completion, correct, answer):
    verdict = judge(ExactMatch(**settings), "Paris", completion)
    assert (verdict.correct, verdict.answer) == (correct, answer)


def test_an_invalid_pattern_is_refused():
    with pytest.raises(ConfigError, match=r"pattern .* is not a regular expression"):
        ExactMatch(pattern="(")


def test_as_verdict_accepts_finite_numbers_and_verdicts():
    assert as_verdict(True) == Verdict(1.0, True)
    assert as_verdict(0) == Verdict(0.0, False)
    assert as_verdict(np.float32(0.5)) == Verdict(0.5, True)
    assert as_verdict(-0.2) == Verdict(-0.2, False)
    verdict = Verdict(0.2, True, "x")
    assert as_verdict(verdict) is verdict
    for value in (None, "1", [1]):
        with pytest.raises(TypeError):
            as_verdict(value)
    with pytest.raises(ValueError, match="finite"):
        as_verdict(float("nan"))
