"""The procedurally generated tasks of reasoning-gym."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import sympy
import sympy.parsing.sympy_parser as parser

from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.tasks import ReasoningGym
from rlrt_lightning.tasks import closed_eval as closing
from rlrt_lightning.tasks.closed_eval import closed_eval
from rlrt_lightning.tasks.verifier import Verifier
from tests.helpers.marks import slow_except
from tests.helpers.processes import ROOT

pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")

NAMES = [
    "chain_sum",
    "basic_arithmetic",
    "countdown",
    "knights_knaves",
    "letter_counting",
    "simple_equations",
    "zebra_puzzles",
]


@pytest.mark.parametrize("name", slow_except(NAMES, *NAMES[:-1]))
def test_problems_are_deterministic_and_their_own_answers_correct(name):
    task, again = ReasoningGym(name), ReasoningGym(name)
    for split, size in (("train", 100_000), ("heldout", 200)):
        problems = task.problems(split)
        assert len(problems) == size
        picked = [problems[0], *problems[10:12], problems[-1]]
        assert picked == [again.problems(split)[i] for i in (0, 10, 11, size - 1)]
        for problem in picked:
            assert problem.prompt.endswith("</answer>.")
            worker = pickle.loads(pickle.dumps(task))
            verdict = worker.verify(pickle.loads(pickle.dumps(problem)), f"Well. <answer>\n{problem.answer}</answer>")
            assert verdict.correct
            assert verdict.reward == 1
            assert verdict.answer == str(problem.answer).strip()
    with pytest.raises(IndexError):
        task.problems("heldout")[200]


def test_splits_and_seeds_share_no_problem():
    config = {"min_terms": 6, "min_digits": 4}
    task, other = (ReasoningGym("chain_sum", size=300, heldout=50, seed=seed, config=config) for seed in (0, 1))
    train, heldout = ({p.prompt for p in task.problems(split)} for split in ("train", "heldout"))
    assert len(train) == 300
    assert not train & heldout
    assert not (train | heldout) & {p.prompt for split in ("train", "heldout") for p in other.problems(split)}
    more = ReasoningGym("chain_sum", size=400, heldout=50, config=config)
    assert heldout == {p.prompt for p in more.problems("heldout")}  # whatever the size of the training set
    ids = [p.id for split in ("train", "heldout") for p in task.problems(split)]
    assert len(set(ids)) == 350


def test_splits_share_no_question_if_the_generator_can_make_few():
    config = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    task = ReasoningGym("chain_sum", size=300, heldout=40, config=config)
    train, heldout = ([p.prompt for p in task.problems(split)] for split in ("train", "heldout"))
    assert len(set(heldout) | set(train)) < 340  # so that the generator repeats itself
    assert not set(train) & set(heldout)
    assert len({p.id for p in task.problems("train")}) == 300
    assert train == [p.prompt for p in pickle.loads(pickle.dumps(task)).problems("train")]
    with pytest.raises(ConfigError, match="nearly all problems of reasoning-gym's task chain_sum are held-out ones"):
        ReasoningGym("chain_sum", size=100, heldout=2000, config=config).problems("train")[0]


@pytest.mark.parametrize(
    ("completion", "correct", "answer"),
    [
        ("<answer>{}</answer>", True, "{}"),
        ("between <answer> and </answer>: <answer>0</answer> no, <answer> {} </answer>", True, "{}"),
        ("<answer>{}</answer> no, <answer>x</answer>", False, "x"),
        ("<answer>{}", False, None),
        ("{}</answer>", False, None),
        ("{}", False, None),
        ("", False, None),
        ("<answer>" * 100_000, False, None),
    ],
)
def test_only_the_last_complete_answer_counts(completion, correct, answer):
    task = ReasoningGym("chain_sum")
    problem = task.problems("train")[0]
    verdict = task.verify(problem, completion.replace("{}", problem.answer))
    assert verdict.correct is correct
    assert verdict.answer == (answer and answer.replace("{}", problem.answer))


def test_a_partial_score_is_a_reward_but_not_correct():
    task = ReasoningGym("letter_counting")
    problem = task.problems("train")[0]
    verdict = task.verify(problem, f"<answer>it is {problem.answer}</answer>")
    assert 0 < verdict.reward < 1
    assert not verdict.correct
    assert "scored" in verdict.message


EVALUATING = [  # tasks whose scorers call eval on an answer
    ("binary_matrix", "[[0, 1], [1]]"),
    ("countdown", "1 + sqrt(4)*abs(-3)"),
    ("intermediate_integration", "exp(x)*sin(x) + C"),
    ("n_queens", "[['Q', '_']]"),
    ("polynomial_multiplication", "x**2 - 2*x"),
    ("puzzle24", "(1 + 2)*8"),
    ("simple_integration", "x**3/3 + log(x) + C"),
    ("spiral_matrix", "[1, 2, 3]"),
    ("string_insertion", "['A', 'B']"),
]
HOSTILE = [
    "__import__('os').system('touch {}')",
    "[open('{}', 'w')]",
    "exec(\"open('{}', 'w')\")",
    "(lambda: open('{}', 'w'))()",
    "[open('{}', 'w') for _ in (1,)]",
    'f\'{{open("{}", "w")}}\'',
    'sin(\'open("{}", "w")\')',
    "().__class__.__base__.__subclasses__()",
    "exit()",
]


@pytest.mark.parametrize(("name", "honest"), EVALUATING)
def test_no_answer_is_executed(name, honest, tmp_path):
    task = ReasoningGym(name, size=3, heldout=1)
    problem = task.problems("train")[0]
    for answer in HOSTILE:
        verdict = task.verify(problem, f"<answer>{answer.format(tmp_path / 'trace')}</answer>")
        assert verdict.reward < 0.1
        assert not list(tmp_path.iterdir())
    names = {"x": sympy.Symbol("x"), "C": sympy.Symbol("C")}
    assert closed_eval(honest, vars(sympy), {**names, "abs": abs}) == eval(honest, {**vars(sympy), **names})


def test_answers_are_judged_in_worker_processes():
    task = ReasoningGym("chain_sum")
    with Verifier(task, workers=1, timeout_s=2) as verifier:
        problems = task.problems("train")[:20]
        verdicts = [verifier.submit(p, f"<answer>{p.answer}</answer>") for p in problems]
        assert all(verdict.result(timeout=60).correct for verdict in verdicts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "chain_sums"}, "no task 'chain_sums'; did you mean chain_sum"),
        ({"name": "qqqqqqq"}, "one of .*chain_sum"),
        ({"name": "chain_sum", "config": {"terms": 3}}, "chain_sum rejects config or size: .*'terms'"),
        ({"name": "chain_sum", "config": {"min_terms": 0}}, "min_terms must be positive"),
        ({"name": "chain_sum", "config": {"seed": 0}}, "config must not contain 'seed'"),
        ({"name": "chain_sum", "size": 0}, "size must be"),
        ({"name": "chain_sum", "heldout": -1}, "heldout must be"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        ReasoningGym(**settings).problems("train")
    assert "\n" not in str(error.value)


def test_without_reasoning_gym_the_error_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ConfigError, match=r"pip install 'rlrt-lightning\[reasoning-gym\]'"):
        ReasoningGym("chain_sum").problems("train")


@pytest.mark.parametrize("name", [name for name, _ in EVALUATING])
def test_a_release_that_runs_answers_is_refused(name, monkeypatch):
    """Such as one that gets `eval` from elsewhere, against which replacing it in these modules does nothing."""
    task = ReasoningGym(name, size=3, heldout=1)
    problem = task.problems("train")[0]
    for module in [parser, *(m for n, m in sys.modules.items() if n.partition(".")[0] == "reasoning_gym")]:
        monkeypatch.setitem(vars(module), "eval", eval)  # put back what other tests have replaced
    monkeypatch.setattr(closing, "closed_eval", eval)
    with pytest.raises(ConfigError, match=r"^data.task: reasoning-gym .* and sympy .* execute code"):
        task.verify(problem, "<answer>1</answer>")


def test_problems_are_drawn_without_a_change_to_other_libraries():
    """The process that trains draws problems, and only the verifier's processes score answers."""
    code = (
        "import sympy.parsing.sympy_parser as parser; from rlrt_lightning.tasks import ReasoningGym\n"
        "task = ReasoningGym('countdown', size=3, heldout=1); problem = task.problems('train')[0]\n"
        "assert 'eval' not in vars(parser); task.verify(problem, '<answer>1</answer>'); assert 'eval' in vars(parser)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
