r"""How spellings of answers are read: white space, mixed numbers, symbols, empty answers, numbers of any type."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from rlrt_lightning.tasks import ExactMatch, MathReward, Problem
from rlrt_lightning.tasks.answers import canonical, normalized, readable, truths
from tests.helpers.marks import slow_except
from tests.helpers.truths import TRUTHS


def right(gold, completion, reward=None):
    verdict = (reward or MathReward())(Problem("p", "question", gold), completion)
    assert verdict.reward == verdict.correct
    return verdict.correct


def boxed(gold, answers, reward=None):
    """The answers that are judged correct in a box."""
    return [answer for answer in answers if right(gold, rf"Hence $\boxed{{{answer}}}$.", reward)]


# Ground truth, right answers, wrong answers.
SPELLINGS = [
    (
        "12",
        ["12", "{12}"],
        [r"1 2", r"1\,2", r"1\ 2", "1~2", r"1\quad 2", "1\u00a02", "1\u20092", r"1\;2", "1\n2", "1'2"],
    ),
    ("12", [], [r"1{,}2", r"\text{1 2}", "$1 2$", "1 2.", r"1\text{ }2", r"1\hspace{1pt}2", r"1\mbox{ }2", r"1{\,}2"]),
    ("3", ["3", "3.0"], ["1 2", "3 0", "3 1/2", "2 1", r"1\,2"]),  # adjacent numbers are not a sum
    ("10", [], ["5 5", "1 0", "2 5"]),
    ("2", [], ["3 1/2", "1 1"]),
    ("31/2", ["31/2", r"\frac{31}{2}", "15.5", "15 1/2"], ["3 1/2", r"3\frac12", "3½", "3 ½", r"3\ 1/2"]),
    ("1/2", ["½", "1 / 2"], ["3 1/2", r"3\frac12"]),
    (
        "7/2",
        ["3 1/2", r"3\,1/2", r"3\ 1/2", "3~1/2", "3\u00a01/2", "3 1 / 2", "x=3 1/2", r"3 1/2 \text{ cm}"],
        ["-3 1/2"],
    ),
    (
        "7/2",
        [r"3\frac12", r"3 \frac{1}{2}", r"3\,\dfrac{1}{2}", r"3\ \tfrac12", r"3\frac 12", r"3\frac1{2}"],
        ["3-1/2"],
    ),
    ("7/2", ["3½", "3 ½", "3 1⁄2", "(3 1/2)", "3 1/2.", r"\text{3 1/2}"], ["3 2", "3 1 / 3", "3 1/20"]),
    ("-7/2", ["-3 1/2", r"-3\frac{1}{2}", "−3½"], ["3 1/2", "-5/2", "-3+1/2"]),
    ("5/2", [], [r"3 1/2", r"-3\frac12"]),
    ("3 1/2", ["7/2", "3.5", r"3\frac12", r"\frac72", "3½"], ["31/2", "3 1/3", "3/2"]),
    ("(3 1/2, 2)", ["(7/2,2)", "(3.5, 2)"], ["(31/2, 2)"]),
    (
        "1440",
        ["1 440", r"1\,440", "1{,}440", "1,440", r"1\ 440", "1~440", r"1\;440", r"1,\!440", r"1{,}\!440"],
        ["14 40"],
    ),
    (
        "1440",
        ["1\u00a0440", "1\u202f440", "1\u2009440", "1'440", "1’440", "１４４０", "1，440", r"1{\,}440"],
        ["1 4 4 0"],
    ),
    (
        "1440",
        ["$1,440$", "x=1,440", r"\$1,440", r"1\,440\text{ cm}", r"1,440 \text{ cm}"],
        ["1, 440", "(1,440)", "144 0"],
    ),
    ("1440", ["1440.0"], [r"1\,44\,0", "1 0440", "0 1440", "1 440 0", r"\{1,440\}", "1.440", "1,44,0", "1 440/1 0"]),
    ("1 440", ["1440", "1,440", r"1\,440"], ["1 441", "440", "441"]),
    (
        "1234567",
        ["1 234 567", r"1\,234\,567", "1{,}234{,}567", r"1, \! 234, \! 567", "1'234'567"],
        ["1 234 56 7", "1234 567"],
    ),
    ("1440.5", ["1 440.5", "1{,}440.5", "1,440.5"], ["1 440. 5", "1440 .5"]),
    ("-1440", ["-1 440", "−1,440", r"- 1\,440"], ["1 440"]),
    ("100", [], ["1{,}00", "1 00", r"1\,00", "10 0", "1,00"]),
    ("3.5", [], ["3. 5", "3 .5", "3 . 5", "3 5"]),
    ("0.55", [], ["0.5 5"]),
    ("1024", ["2^{10}"], ["2^{1 0}"]),
    ("4", ["12/3"], [r"\frac{1 2}{3}", r"\frac{4 0}{1 0}"]),
    ("(12,3)", ["( 12 , 3 )"], ["(1 2,3)", "(1,2 3)"]),
    ("100, 200", ["100,200", "100, 200", "200, 100"], ["100200", "100 200"]),
    ("1 2", ["1 2", r"1\,2"], ["12", "3", "2"]),
    # -- relations and symbols
    (
        r"x \neq 5",
        [r"x \ne 5", "x != 5", "x ≠ 5", "x≠5", "x!=5", r"x \not= 5", r"x\not =5", r"5 \neq x", "x =\u0338 5"],
        ["5"],
    ),
    (
        r"x \neq 5",
        [r"$x \neq 5$", "x <> 5", r"x \neq 5.", r"x\;\neq\;5"],
        ["x = 5", r"x \ne 6", r"y \neq 5", "x > 5", "x != -5"],
    ),
    (r"x \neq 5", [], [r"x \equiv 5", r"x \in 5", r"x \ne 5 5", r"x \ne 5, x \ne 6", r"x \ne 5 \text{ or } x = 5"]),
    ("x ≠ 5", [r"x \neq 5", "x!=5"], ["x=5"]),
    (r"x \ne 1, 2", [r"x \neq 1, x \neq 2", r"x \ne 2, 1"], ["x = 1, 2", r"x \ne 1", r"x \ne 1, x = 2"]),
    ("x=5", ["5 = x"], ["x≠5", r"x \not= 5"]),
    (
        r"x \le 5",
        [r"x \leq 5", "x <= 5", "x≤5", r"x \leqslant 5", "x≦5", "5≥x", r"(-\infty,5]"],
        ["x<5", "x≥5", r"x \nleq 5"],
    ),
    (r"x \ge 5", [r"x \geq 5", "x >= 5", "x≥5", r"x \geqslant 5", "5<=x", "[5,∞)"], ["x>5", "x≤5", "(5,∞)"]),
    ("x < 5", [r"x \lt 5", "x＜5", "5>x", "(-∞,5)"], ["x≤5", r"x \gt 5"]),
    ("x > 5", [r"x \gt 5", r"5 \lt x", "x＞5"], ["x≥5", "x<5"]),
    (r"1 < x \le 5", ["1<x<=5", r"1 \lt x \leq 5", "(1,5]"], ["1<x<5", "[1,5]"]),
    (r"x \in (1,2)", ["x∈(1,2)"], [r"x \notin (1,2)", "x∉(1,2)", r"x \not\in (1,2)"]),
    (r"x \notin (1,2)", ["x∉(1,2)", r"x \not\in (1,2)"], ["x∈(1,2)"]),
    (
        r"(-\infty,2)\cup(3,\infty)",
        ["(-∞,2)∪(3,∞)", "(−∞, 2) ∪ (3, ∞)", r"(3,\infty) U (-\infty,2)"],
        ["(-∞,2]∪(3,∞)", "(-∞,2)"],
    ),
    (r"(1,\infty)", ["(1,∞)", "（1，∞）"], ["[1,∞)", "(1,-∞)"]),
    (r"2\pi", ["2π", "2 π", "2·π", "π×2", "2pi", "2𝜋"], ["π", "π²", "2"]),
    (r"\frac{\pi}{2}", ["π/2", "½π", "0.5π"], ["π", "2/π"]),
    (r"2\sqrt{3}", ["2√3", "2√(3)", "2·√3", "√12", r"2 \sqrt 3"], ["√3", "3√2", "√1 2"]),
    (r"\sqrt[3]{5}", ["∛5"], ["√5"]),
    ("x^2+1", ["x²+1", "1+x²"], ["x₂+1", "2x+1"]),
    ("10^{-3}", ["10⁻³", "10^-3", "0.001"], ["10³"]),
    (r"90^\circ", ["90°", "90º", "90 °", r"90 \degree", r"90^{\circ}", "90"], ["9°"]),
    (r"\pm 3", ["±3", "-3,3"], ["3", "∓4"]),
    (r"\emptyset", ["∅", r"\varnothing", r"\{\}", r"\{ \}"], [r"\{0\}", "{}"]),
    (r"\{1,2\}", [r"\lbrace 1,2 \rbrace", r"\{１，２\}", r"\left\{ 2, 1 \right\}"], [r"\{12\}", r"\{1 2\}"]),
    (r"\mathbb{R}", ["ℝ"], ["R", "ℤ"]),
    ("6", ["2×3", "2·3", "12÷2", "2∗3", "18⁄3", "６", "٦"], ["2 3", "2÷3"]),
    ("-5", ["−5", "–5", "－5"], ["5"]),
    (r"50\%", ["50％", "50%", "50", "0.5"], ["5"]),
    (r"\alpha", ["α"], ["β"]),
    # -- numbers that are not text
    (
        1e-05,
        ["0.00001", "1e-05", "1e-5", "1E-5", "10^{-5}", r"1\times10^{-5}", "1×10⁻⁵", "1/100000"],
        ["0.00002", "0", "1e-6"],
    ),
    ("1e-05", ["0.00001", "10^{-5}"], ["0.00002", "-5"]),
    (1e-07, ["0.0000001", "10^{-7}"], ["0", "0.0", "2e-07", "0.0000002", "10^{-8}"]),
    (".0000672", ["0.0000672", r"6.72\times10^{-5}"], ["0.0000674", "0.00007"]),
    (1e22, ["10^{22}", "1e22", "1e+22", "1" + "0" * 22], ["1e21", "10^{21}"]),
    ("2e-3", ["2e-3", "-3+2e"], ["2e+3"]),  # here e is either an exponent or Euler's number
    (42.0, ["42", "42.0", r"\frac{84}{2}"], ["420", "4.20"]),
    (-0.0, ["0"], ["1"]),
    (0.30000000000000004, ["0.3"], ["0.31"]),
    (True, ["True", "true", r"\text{True}"], ["1", "False"]),
    (False, ["false"], ["0", "True"]),
    (1, ["1"], ["True"]),
    (Decimal("2.50"), ["2.5", "5/2"], ["25"]),
    (Fraction(1, 3), ["1/3"], ["3"]),
    (np.float32(0.1), ["0.1"], ["0.01"]),
    (np.int64(5), ["5"], ["6"]),
    (np.bool_(True), ["True"], ["1"]),
    (np.array(["4", "5"]), ["4", "5"], ["4, 5", "9"]),
    # -- several answers, and empty ones
    (
        ["4", ""],
        ["4"],
        [".", r"\,", "None", "", "{}", r"\text{}", "null", "nan", r"\ ", "$$", "~", ",", r"\quad", "\u200b"],
    ),
    (["5", None], ["5"], [".", r"\,", "None", "", "null", r"\text{None}"]),
    ([5, float("nan"), float("inf")], ["5"], ["nan", "NaN", "inf", r"\infty"]),
    (["5", ".", r"\,", "$$"], ["5"], [".", r"\,", "$$"]),
    ("None", ["None", r"\text{none}"], ["", ".", "null"]),
    (["4", "5"], ["4", "5"], ["4, 5", "4 or 5", "9"]),
    ('["34", "35"]', ["34", "35"], ["34, 35"]),
    ("['34', '35']", ["35"], ["69"]),
    ({"ground_truth": ["5", None], "style": "rule"}, ["5"], ["None", "rule"]),
]


@pytest.mark.parametrize(("gold", "same", "different"), SPELLINGS)
def test_equal_spellings_are_correct_and_different_ones_wrong(gold, same, different):
    assert boxed(gold, same) == same
    assert boxed(gold, different) == []


@pytest.mark.parametrize("gold", [None, "", " ", ".", "$$", [], [None, ""], float("nan"), {"target": 5}, b"5", [["5"]]])
def test_an_unusable_ground_truth_is_a_fault(gold):
    for reward in (MathReward(), ExactMatch()):
        verdict = reward(Problem("p", "question", gold), r"\boxed{.}")
        assert not verdict.correct
        assert verdict.fault == (gold not in (".", "$$") or isinstance(reward, MathReward))


@pytest.mark.parametrize(
    ("gold", "completion", "correct"),
    [
        ("7/2", "The answer is 3 1/2.", True),
        ("31/2", "The answer is 3 1/2.", False),
        ("1/2", r"The answer is 3\frac{1}{2}.", False),
        ("7/2", r"The answer is 3\frac{1}{2}.", True),
        ("7/2", "answer: 3½", True),
        ("1440", r"The answer is 1\,440.", True),
        ("1440", "We have 12\n440 of them. The answer is 1,440.", True),
        ("12", "The answer is 1 2.", False),
        ("1", "The answer is 1 2.", False),
        ("3", "The answer is $1 2$.", False),
        (r"x \neq 5", "The answer is $x≠5$.", True),
        ("5", r"The answer is x \neq 5", False),
        ("-5", "The answer is −5", True),
        (1e-05, "The answer is 0.00001", True),
        (["5", None], "The answer is None.", False),
    ],
)
def test_answers_outside_a_box_are_read_the_same(gold, completion, correct):
    assert right(gold, completion) == correct


BOX_FORMATS = [
    r"\boxed{{{0}}}",
    r"so \boxed{{ {0} }}, done in 3 steps",
    r"\boxed{{${0}$}}",
    r"\[\boxed{{{0}}}\]",
    r"\boxed{{\({0}\)}}",
    r"\boxed{{{0}.}}",
    r"\fbox{{\,{0}\,}}",
    r"\boxed{{\displaystyle {0}}}",
    "\\boxed\n{{\n{0}\n}}",
    "The answer is ${0}$.",
]


@pytest.mark.parametrize("step", slow_except([1, 3], 3))
def test_real_ground_truths_match_themselves_in_any_box_format(step):
    assert len(set(TRUTHS)) >= 60
    for gold in TRUTHS[::step]:
        for form in BOX_FORMATS:
            assert right(gold, form.format(gold)), (gold, form)
        tight = gold.replace(" ", "").replace(r"\frac", r"\dfrac")
        assert right(gold, rf"\boxed{{{tight}}}"), tight


@pytest.mark.parametrize("step", slow_except([1, 3], 3))
def test_changed_or_swapped_real_ground_truths_are_wrong(step):
    for gold, other in list(zip(TRUTHS, [*TRUTHS[1:], TRUTHS[0]], strict=True))[::step]:
        wrong = [f"{gold}+1", f"1+{gold}", f"{gold} 7", other, rf"\neq {gold}", "", ".", "None"]
        assert boxed(gold, wrong) == [], gold


@pytest.mark.parametrize(
    ("gold", "same", "different"),
    [
        (42.0, ["42", "42.0", " 42\n", "4.2e1"], ["42.5", "forty-two", "4_2", "４２", "42 0", ""]),
        (42, ["42", "42.0"], ["True"]),
        (1e-05, ["0.00001", "1e-05", "1e-5", ".00001"], ["0", "0.000011"]),
        (1e22, ["1e+22", "10000000000000000000000"], ["1e+21"]),
        (-0.0, ["0", "-0.0"], [""]),
        (True, ["True", "true"], ["1", "False"]),
        (1, ["1"], ["True"]),
        (np.float32(0.1), ["0.1"], ["0.10000000149011612"]),
        (np.int64(3), ["3"], ["4"]),
        (Decimal("2.50"), ["2.5", "2.50"], ["250"]),
        (10**25, ["1e25", str(10**25)], [str(10**25 + 1)]),
        ("42.0", ["42.0"], ["42", "42.00"]),  # text is compared as text
        (
            ["Paris", "Lutetia", "", None],
            ["Paris", "Lutetia"],
            ["", "None", "Paris or Lutetia", "['Paris', 'Lutetia']"],
        ),
        (["42", 7], ["42", "7.0"], ["42.0"]),
        (float("nan"), [], ["nan", "NaN"]),
        ({"ground_truth": "a"}, ["a"], ["ground_truth"]),
    ],
)
def test_exact_match_compares_numbers_by_value_and_takes_any_of_several(gold, same, different):
    assert [answer for answer in [*same, *different] if right(gold, answer, ExactMatch())] == same


def test_ground_truths_become_readable_text():
    assert truths(["4", "", None, 5.0, True]) == ["4", Decimal(5), True]
    for value, text in [
        (["5", "7"], "5 or 7"),
        (["5", None], "5"),
        ([5.0, 1e-05], "5 or 0.00001"),
        (1e22, "1" + "0" * 22),
        (7, "7"),
        ("  x ", "x"),
        ({"ground_truth": "5"}, "5"),
        ({"target": 5}, '{"target": 5}'),
        (None, None),
        (["", None], None),
    ]:
        assert Problem("p", "question", value).answer_text == readable(value) == text


def test_canonical_spelling_is_idempotent():
    for gold, same, different in SPELLINGS:
        for text in [gold, *same, *different]:
            if isinstance(text, str):
                assert canonical(canonical(text)) == canonical(text)
                assert normalized(canonical(text)) == canonical(text)


def test_an_answer_far_longer_than_the_ground_truth_is_wrong():
    assert not right("5", r"\boxed{" + "5" * 1_000_000 + "}")
    long = "word " * 5_000
    assert right(long, rf"\boxed{{{long}}}")
