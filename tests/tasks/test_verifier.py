"""The verifier's worker processes: a completion that hangs, crashes or misbehaves affects no other."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.tasks.base import Problem, Task, Verdict
from rlrt_lightning.tasks.verifier import Verifier
from tests.helpers.processes import ROOT
from tests.helpers.unruly import PROBLEM, Unruly


class Inline(Unruly):
    isolated = False


class Slow(Unruly):
    """Takes longer to warm up than the time limit of a completion."""

    def warm_up(self):
        time.sleep(1.5)


class Broken(Unruly):
    def warm_up(self):
        raise ImportError("no module named nowhere")


@pytest.fixture(scope="module")
def verifier():
    with Verifier(Unruly(), workers=2, timeout_s=1.0, memory_gb=1.0) as verifier:
        yield verifier


def judge(verifier, completion):
    return verifier.submit(PROBLEM, completion).result(timeout=30)


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("sleep:60", "time limit of 1 s"),
        ("power", "time limit of 1 s"),
        ("exit", "exit code 3"),
        ("segfault", "signal 11"),
        ("sys.exit", "SystemExit: gone"),
        ("raise", "ValueError: one two xxx"),
        ("memory", "MemoryError"),
        ("recurse", "RecursionError"),
        ("nan", "reward nan"),
        ("none", "NoneType"),
        ("silent", "UnprintableError"),
    ],
)
def test_a_failing_completion_is_a_fault_and_the_next_one_is_judged(verifier, completion, message):
    verdict = judge(verifier, completion)
    assert verdict.fault
    assert not verdict.correct
    assert verdict.reward == 0
    assert message in verdict.message
    assert "\n" not in verdict.message
    assert len(verdict.message) <= 300
    assert [judge(verifier, "fine").correct for _ in range(4)] == [True] * 4


def test_a_verdict_returns_as_plain_values_of_bounded_size(verifier):
    assert "lambda" in judge(verifier, "unpicklable").answer
    verdict = judge(verifier, "long")
    assert verdict.correct
    assert len(verdict.answer) == 1000
    assert len(verdict.message) == 300
    assert len(verdict.label) == 100


def test_a_completion_of_many_megabytes_is_judged(verifier):
    assert judge(verifier, "x" * 20_000_000).answer == "unruly 20000000"


def test_a_verifier_that_forks_answers_once(verifier):
    futures = [verifier.submit(PROBLEM, f"fork:{i}") for i in range(40)]
    assert [future.result(timeout=30).answer for future in futures] == [str(i) for i in range(40)]


def test_side_effects_in_a_worker_do_not_affect_other_completions(verifier):
    for what in ["chdir", "print", "thread"] * 2:
        assert judge(verifier, what).correct
    assert {judge(verifier, "cwd").answer for _ in range(4)} == {os.getcwd()}


def test_a_worker_that_reads_no_more_input_is_replaced():
    with Verifier(Unruly(), workers=1, timeout_s=1.0) as one:
        assert judge(one, "stop").correct
        time.sleep(0.3)
        assert judge(one, "x" * 20_000_000).fault
        assert judge(one, "x" * 20_000_000).correct


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_a_worker_above_half_of_its_memory_limit_is_replaced():
    with Verifier(Unruly(), workers=1, timeout_s=5.0, memory_gb=1.0) as one:
        pids = [judge(one, f"hoard:{300_000_000}").answer for _ in range(4)]
        assert not any(judge(one, "fine").fault for _ in range(3))
    assert pids[0] == pids[1] != pids[2] == pids[3]


def test_a_hanging_completion_does_not_delay_the_other_worker(verifier):
    judge(verifier, "fine")
    start = time.monotonic()
    hang = verifier.submit(PROBLEM, "sleep:60")
    quick = [verifier.submit(PROBLEM, "fine") for _ in range(50)]
    assert all(future.result(timeout=30).correct for future in quick)
    assert time.monotonic() - start < 1
    assert hang.result(timeout=30).fault


def test_thousands_of_completions_are_judged_among_crashing_ones(verifier):
    futures = [verifier.submit(PROBLEM, "exit" if i % 500 == 250 else f"fine {i}") for i in range(3000)]
    verdicts = [future.result(timeout=30) for future in futures]
    assert [i for i, verdict in enumerate(verdicts) if verdict.fault] == list(range(250, 3000, 500))
    assert all(verdict.answer == f"unruly {len(f'fine {i}')}" for i, verdict in enumerate(verdicts) if i % 500 != 250)


def test_idle_workers_that_are_killed_are_replaced(verifier):
    pids = {int(future.result(timeout=30).answer) for future in [verifier.submit(PROBLEM, "pid") for _ in range(200)]}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    verdicts = [future.result(timeout=30) for future in [verifier.submit(PROBLEM, "pid") for _ in range(8)]]
    assert all(verdict.correct for verdict in verdicts)
    assert not pids & {int(verdict.answer) for verdict in verdicts}


def test_child_processes_end_with_their_worker(verifier, tmp_path):
    assert judge(verifier, f"child:{tmp_path / 'pid'}").fault
    child = int((tmp_path / "pid").read_text())
    for _ in range(50):
        try:  # a killed child may remain a zombie until it is reaped
            if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
            os.kill(child, 0)
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.1)
    pytest.fail("the child is still running")


def test_several_tasks_share_the_workers(verifier):
    other = verifier.for_task(Unruly("other"))
    pids = {judge(v, "pid").answer for v in [verifier, other] * 20}
    assert len(pids) <= 2
    assert judge(other, "12345").answer == "other 5"
    assert judge(verifier, "12345").answer == "unruly 5"
    assert judge(verifier.for_task(Inline()), "pid").answer == str(os.getpid())


def test_a_task_that_is_not_isolated_runs_in_this_process_and_cannot_raise():
    verifier = Verifier(Inline(), workers=1)
    assert judge(verifier, "pid").answer == str(os.getpid())
    assert judge(verifier, "raise").fault
    assert judge(verifier, "none").fault


def test_warming_up_does_not_count_against_the_time_limit():
    with Verifier(Slow(), workers=1, timeout_s=0.5) as verifier:
        assert judge(verifier, "fine").correct


def test_a_task_that_fails_to_warm_up_is_an_error_not_a_wrong_answer():
    with Verifier(Broken(), workers=1) as verifier, pytest.raises(ConfigError, match="ImportError: no module named"):
        judge(verifier, "fine")


def test_close_cancels_pending_work_and_a_later_submit_restarts():
    verifier = Verifier(Unruly(), workers=1, timeout_s=30)
    judge(verifier, "fine")
    running, waiting = verifier.submit(PROBLEM, "sleep:30"), verifier.submit(PROBLEM, "fine")
    time.sleep(0.3)
    start = time.monotonic()
    verifier.close()
    verifier.close()
    with pytest.raises(RuntimeError, match="closed"):
        running.result(timeout=5)
    with pytest.raises(CancelledError):
        waiting.result(timeout=5)
    assert time.monotonic() - start < 2
    assert judge(verifier, "fine").correct
    verifier.close()


@pytest.mark.usefixtures("in_a_script")
def test_invalid_settings_and_unpicklable_inputs_are_refused():
    for settings in ({"workers": 0}, {"timeout_s": 0}, {"timeout_s": float("inf")}, {"memory_gb": -1}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            Verifier(Unruly(), **settings)
    task = Unruly()
    task.name = lambda: 0
    with pytest.raises(ConfigError, match="cannot be pickled"):
        Verifier(task)
    with pytest.raises(ConfigError, match="'p' cannot be pickled"):
        Verifier(Unruly()).submit(Problem("p", "question", answer=lambda: 0), "fine")


SCRIPT = """
import os, sys, time
from rlrt_lightning.tasks import Problem, Task, Verdict
from rlrt_lightning.tasks.verifier import Verifier

class Here(Task):
    def problems(self, split): return []
    def verify(self, problem, completion):
        time.sleep(float(completion))
        return Verdict(1.0, True, answer=str(os.getpid()))

def main():
    verifier = Verifier(Here(), workers=2, timeout_s=60)
    print(verifier.submit(Problem("p", "q"), "0").result().answer, flush=True)
    for _ in range(10):
        verifier.submit(Problem("p", "q"), "50")
    time.sleep(0.3)
    {ending}

{guard}
    main()
"""


def process_ended(pid):
    """Whether a process ends within ten seconds."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("ending", "code"),
    [("pass", 0), ("raise KeyboardInterrupt", -signal.SIGINT), ("sys.exit(7)", 7)],
)
def test_a_script_that_does_not_close_the_verifier_still_exits(tmp_path, ending, code):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(ending=ending, guard='if __name__ == "__main__":'))
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=20,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == code, done.stderr
    assert process_ended(int(done.stdout))
    if code >= 0:
        assert done.stderr == ""


def test_a_killed_run_leaves_no_idle_worker_behind(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.format(
            ending="verifier.close(); print(verifier.submit(Problem('p', 'q'), '0').result().answer"
            ", flush=True); os.kill(os.getpid(), 9)",
            guard='if __name__ == "__main__":',
        )
    )
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=20,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == -9, done.stderr
    assert all(process_ended(int(pid)) for pid in done.stdout.split())


def test_a_script_without_a_main_guard_is_refused(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(ending="pass", guard="if True:"))
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode != 0
    assert '__name__ == "__main__"' in done.stderr.splitlines()[-1]


def judge_by_length(problem, completion):
    return Verdict(float(len(completion) > 3), len(completion) > 3)


class ByFunction(Task):
    """A task that judges with the callable that it is given."""

    def __init__(self, judge):
        self.judge = judge

    def problems(self, split):
        return [PROBLEM]

    def verify(self, problem, completion):
        return self.judge(problem, completion)


class Judge:
    def by_length(self, problem, completion):
        return judge_by_length(problem, completion)


def local_function():
    def judge(problem, completion):
        return judge_by_length(problem, completion)

    return judge


def local_class():
    class Local(Unruly): ...

    return Local()


@pytest.mark.usefixtures("in_a_script")
@pytest.mark.parametrize(
    ("task", "what"),
    [
        (lambda: ByFunction(lambda problem, completion: None), "ByFunction"),
        (lambda: ByFunction(local_function()), "ByFunction"),
        (lambda: ByFunction(functools.partial(local_function())), "ByFunction"),
        (lambda: ByFunction(threading.Lock()), "ByFunction"),
        (lambda: ByFunction(x for x in ()), "ByFunction"),
        (local_class, "Local"),
    ],
)
def test_a_task_that_cannot_be_pickled_is_refused_at_the_start(task, what):
    with pytest.raises(
        ConfigError, match=f"the task {what} cannot be pickled .*; put rewards and tasks at the top level"
    ):
        Verifier(task())


@pytest.mark.parametrize("judge", [judge_by_length, functools.partial(judge_by_length), Judge().by_length])
def test_functions_partials_and_bound_methods_of_a_file_are_accepted(judge):
    with Verifier(ByFunction(judge), workers=1) as verifier:
        assert verifier.submit(PROBLEM, "long").result(timeout=60).correct


def as_in_a_notebook(monkeypatch, code):
    """Runs code like a notebook cell: in a main module without a file."""
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    exec(code, vars(main))
    return main


CELL = """
from rlrt_lightning.tasks import Task, Verdict, DatasetTask, ExactMatch

full = 1.0

def judge(problem, completion):
    return Verdict(full, True)

unnamed = lambda problem, completion: judge(problem, completion)

class Mine(ExactMatch):
    def score(self, problem, completion):
        return judge(problem, completion)

class Puzzles(Task):
    def problems(self, split): return []
    def verify(self, problem, completion): return judge(problem, completion)
"""


@pytest.mark.parametrize(
    "make",
    [
        lambda main: main.Puzzles(),
        lambda main: ByFunction(main.Mine(pattern="(.*)").score),
        lambda main: main.DatasetTask(train="a.jsonl", reward=main.judge),
        lambda main: ByFunction(functools.partial(main.judge)),
        lambda main: ByFunction(main.unnamed),
    ],
    ids=["task", "class", "function", "partial", "lambda"],
)
def test_a_reward_defined_in_a_notebook_works(monkeypatch, make):
    """The workers get its code, and what it uses from other cells; `tests/test_examples.py` has a real kernel."""
    main = as_in_a_notebook(monkeypatch, CELL)
    with Verifier(make(main), workers=1) as verifier:
        assert verifier.submit(PROBLEM, "abc").result(timeout=60) == Verdict(1.0, True)


def test_a_reward_in_a_notebook_that_cannot_be_sent_is_refused_at_the_start(monkeypatch):
    code = "import threading\nlock = threading.Lock()\ndef judge(problem, completion):\n    return lock.locked()"
    main = as_in_a_notebook(monkeypatch, code)
    with pytest.raises(ConfigError, match=r"ByFunction cannot be pickled .*lock.*; put .*and use only plain data in"):
        Verifier(ByFunction(main.judge))


def test_a_notebook_may_use_rewards_from_files(monkeypatch):
    as_in_a_notebook(monkeypatch, CELL)
    with Verifier(ByFunction(judge_by_length), workers=1) as verifier:
        assert verifier.submit(PROBLEM, "long").result(timeout=60).correct


def test_a_script_on_stdin_may_use_rewards_from_files():
    code = """
import sys
from rlrt_lightning.tasks import Problem
from rlrt_lightning.tasks.verifier import Verifier
from tests.helpers.unruly import Unruly
with Verifier(Unruly(), workers=2) as verifier:
    verdicts = [verifier.submit(Problem("p", "q"), "abc") for _ in range(4)]
    print([v.result(timeout=60).answer for v in verdicts], sys.modules["__main__"].__file__)
"""
    done = subprocess.run(
        [sys.executable, "-"], cwd=ROOT, input=code, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.split() == [*"['unruly 3', 'unruly 3', 'unruly 3', 'unruly 3'] <stdin>".split()], done.stderr


def test_a_script_may_define_its_own_reward(tmp_path):
    (tmp_path / "script.py").write_text(
        CELL + "from rlrt_lightning.tasks.verifier import Verifier\n"
        "if __name__ == '__main__':\n"
        "    with Verifier(Puzzles(), workers=1) as verifier:\n"
        "        print(verifier.submit(None, 'abc').result(timeout=60).correct)\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr
