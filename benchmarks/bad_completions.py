r"""Tests the rewards with adversarial completions, in the verifier's real worker processes.

    python benchmarks/bad_completions.py --count 5000

The completions contain megabytes of digits, LaTeX nested ten thousand levels deep, towers of exponents, invalid text,
and code that would leave a trace if it were executed. Prints a table by kind. Exits with code 1 if a wrong completion
counted as correct or a correct one as wrong, if a verdict exceeded its time limit or a worker its memory limit, or if
code in a completion was executed. 5,000 completions take five to twelve minutes on two cores.
"""

from __future__ import annotations

import argparse
import multiprocessing.forkserver
import random
import resource
import socket
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rlrt_lightning.tasks import DatasetTask, ExactMatch, LastDigit, MathReward, Problem, ReasoningGym, Task
from rlrt_lightning.tasks.verifier import Verifier

ANSWERS = ["73519", r"\frac{173}{377}", "x^{17}+9x-3", r"\{731, 977\}", "(731,977]", r"\text{Evelyn}", "-0.0731"]
"""Ground truths, which none of the adversarial completions contains by chance."""

SCORERS = [  # the first nine pass the answer to `eval` unless that is prevented
    "binary_matrix",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
    "basic_arithmetic",
    "bitwise_arithmetic",
    "chain_sum",
    "decimal_arithmetic",
    "fraction_simplification",
    "knights_knaves",
    "letter_counting",
    "number_sorting",
    "simple_equations",
    "sudoku",
    "word_ladder",
]


class Case(NamedTuple):
    """A completion, the task that judges it, and whether it is correct."""

    kind: str
    task: str
    problem: Problem
    completion: str
    right: bool = False


def tasks() -> dict[str, Task]:
    """The judging tasks, by name."""
    found: dict[str, Task] = {
        "math": DatasetTask(train="unused"),
        "boxed": DatasetTask(train="unused", reward=MathReward(fallback=False)),
        "exact": DatasetTask(train="unused", reward=ExactMatch()),
        "pattern": DatasetTask(train="unused", reward=ExactMatch(pattern=r"(?:answer is|####)\s*(\S+)")),
        "bomb": DatasetTask(train="unused", reward=ExactMatch(pattern=r"((?:[ab]+)+)c")),
        "last digit": LastDigit(),
    }
    with suppress(ImportError):
        import reasoning_gym  # noqa: F401

        found |= {name: ReasoningGym(name, size=20, heldout=2) for name in SCORERS}
    return found


# One function per kind of answer. The answer is then put in a box, between tags, alone or in the middle of a text.


def digits(rng: random.Random) -> str:
    return str(rng.randint(1, 9)) * rng.choice([5_000, 100_000, 2_000_000])


def decimals(rng: random.Random) -> str:
    return "0." + "3" * rng.choice([5_000, 1_000_000]) + rng.choice(["", "e9", "%"])


def nested(rng: random.Random) -> str:
    opening, closing = rng.choice(
        [(r"\frac{1}{", "}"), (r"\sqrt{", "}"), (r"\left(", r"\right)"), ("(", ")"), ("{", "}"), ("[", "]"), ("|", "|")]
    )
    depth = rng.choice([50, 1_000, 10_000, 100_000])
    return opening * depth + "1" + closing * rng.choice([depth, depth, depth - 1])


def tower(rng: random.Random) -> str:
    base = rng.choice(["9", "10", "x", r"\pi", "(1+i)"])
    power, close = rng.choice([("^{", "}"), ("**", ""), ("^", "")])
    height = rng.choice([3, 5, 60])
    return power.join([base] * height) + close * (height - 1)


def factorial(rng: random.Random) -> str:
    return rng.choice(
        [
            "100000!",
            "9!!!!!!",
            r"(10^{10})!",
            r"\binom{10^9}{5\cdot 10^8}",
            "99999!-99998!",
            "5" + "!" * 500,
        ]
    )


def huge(rng: random.Random) -> str:
    return rng.choice(
        ["[0]*10**10", "'a'*10**11", "[[0]*10**9, [0]*10**9]", "7**7**8", "(1,)*10**10", "0" * 30_000_000]
    )


def unbounded(rng: random.Random) -> str:
    return rng.choice(
        [
            r"\sum_{k=1}^{10^{12}} \frac{1}{k}",
            r"\prod_{k=1}^{10^{7}} k",
            r"\sum_{k=1}^{10^9}\sum_{j=1}^{k} \sin(jk)",
            r"\int_0^{1} e^{\sin(x^{x^{x}})} dx",
            r"\lim_{x \to 0} \frac{\sin(\tan x)-\tan(\sin x)}{x^{77}}",
            r"\sin^{500}(x)\cos^{500}(x)",
            "(a+b+c+d+e)^{200}",
            r"\log_{7^{7^7}}(9^{9^9})",
        ]
    )


def matrix(rng: random.Random) -> str:
    rows, columns = rng.choice([(3, 3), (60, 60), (1, 20_000), (400, 400)])
    row = "&".join(str(rng.randrange(10)) for _ in range(columns))
    return r"\begin{pmatrix}" + r"\\".join([row] * rows) + r"\end{pmatrix}" * rng.choice([1, 1, 0])


def collection(rng: random.Random) -> str:
    items = ",".join(str(rng.randrange(10**6)) for _ in range(rng.choice([10, 1_000, 50_000])))
    return rng.choice([r"\{%s\}", "(%s)", "[%s]", "%s", r"(0,1)\cup[%s)"]) % items


def relations(rng: random.Random) -> str:
    return rng.choice(["=", "<", r"\le ", r"\ne ", r"\in "]).join(["x"] * rng.choice([3, 100, 5_000]))


def operators(rng: random.Random) -> str:
    symbols = r"""+-*/^!(){}[]\$&%_|'"1x"""
    return "".join(rng.choice(symbols) for _ in range(rng.choice([5, 40, 400, 20_000])))


def commands(rng: random.Random) -> str:
    words = (
        r"\frac \sqrt \left( \right] \begin{cases} \end{x} \text{ \mathrm{ \log \sin \lim \int \cdot \pm \infty 1 2 { }"
    )
    return "".join(rng.choice(words.split()) for _ in range(rng.choice([5, 40, 300])))


def boxes(rng: random.Random) -> str:
    return r"\boxed{" * rng.choice([10, 10_000, 1_000_000]) + "1" + "}" * rng.choice([0, 1, 10_000, 1_000_000])


def invalid(rng: random.Random) -> str:
    return rng.choice(["\ud83d", "\udcff\udcfe", "73\ud800519", "\x00", "7\x003519", "�", "\x1b[2J\x07", "\r"])


def unicode(rng: random.Random) -> str:
    return rng.choice(["‮91537", "7͏3͏5͏1͏9͏1", "1" + "̶" * 5_000, "٧٣٥١٨", "７３５１８", "﷽" * 9_000, "⁴²", "½¾", "‏" * 999])


def blank(rng: random.Random) -> str:
    return rng.choice(["", " ", "\n\n", "\t" * 100_000, "​", "{}", r"\text{}", "$$", r"\ ", ",", "."])


def backtracking(rng: random.Random) -> str:
    repeated = rng.choice(["a", "ab", "$", r"\(", "answer is ", "<answer>", "final answer is ", "1,", " "])
    return repeated * rng.choice([30, 3_000, 200_000])


def code(rng: random.Random) -> str:
    """Code that would create the file CANARY, connect to the port PORT, or end the process."""
    act = rng.choice(
        [
            "__import__('os').system('touch CANARY')",
            "open('CANARY','w')",
            "__import__('pathlib').Path('CANARY').touch()",
            "__import__('socket').create_connection(('127.0.0.1',PORT))",
            "__import__('sys').exit('CANARY')",
            "exit('CANARY')",
            "__import__('subprocess').run(['touch','CANARY'])",
            "exec(\"open('CANARY','w')\")",
            "exec(" + "+".join(f"chr({ord(c)})" for c in "open('CANARY','w')") + ")",
            "eval(compile(\"open('CANARY','w')\",'x','eval'))",
            "().__class__.__base__.__subclasses__()[-1].__init__.__globals__['__builtins__']['open']('CANARY','w')",
            "x.__class__.__init__.__globals__['__builtins__']['open']('CANARY','w')",
        ]
    )
    wrap = rng.choice(
        [
            "{}",
            "[{}]",
            "[[{}]]",
            "({},)",
            "1+{}",
            "str({})!",
            'sin("{}")',
            'Integer("{}")',
            "(lambda: {})()",
            "[{} for _ in (1,)]",
            'f"{{{}}}"',
            "'' if {} else ''",
            "{{{}: 1}}",
            "x={}",
            r"\text{{{}}}",
            r"\sqrt{{{}}}",
            r"\operatorname{{{}}}",
            "sympify('''{}''')",
            '!!python/object/apply:eval ["{}"]',
            "cos\nposix\nsystem\n(S'{}'\ntR.",
        ]
    )
    return wrap.format(act)


def shell(rng: random.Random) -> str:
    return rng.choice(
        ["$(touch CANARY)", "; touch CANARY", "`touch CANARY`", r"\write18{touch CANARY}", r"\input{CANARY}"]
    )


KINDS: dict[str, tuple[Callable[[random.Random], str], int]] = {
    # With relative frequencies. Code must never run; the other kinds try to hang the worker or exhaust its memory.
    **{f.__name__: (f, 3) for f in (digits, decimals, nested, tower, factorial, unbounded, huge, matrix, collection)},
    **{f.__name__: (f, 4) for f in (relations, operators, commands, boxes, invalid, unicode, blank, backtracking)},
    "code": (code, 40),
    "shell": (shell, 3),
}

WRAPS = [
    r"so \boxed{ANSWER}.",
    r"\boxed{ANSWER",
    r"\fbox{ANSWER} and no more",
    "The final answer is $ANSWER$. I hope it is correct.",
    "answer: ANSWER",
    r"\[ ANSWER \]",
    "ANSWER",
    "#### ANSWER",
    "<think>ANSWER</think>",
    "<answer>ANSWER</answer>",
    "so <answer>\nANSWER\n</answer>",
]


def cases(count: int, seed: int = 0, canary: str = "", port: int = 9) -> Iterator[Case]:
    """Generates completions, one in twenty of which is correct. Deterministic for given arguments.

    Args:
        count: Number of completions.
        seed: Random seed.
        canary: The file that code in the completions would create.
        port: The port that code in the completions would connect to.
    """
    rng = random.Random(f"bad-completions/{seed}")
    judges = tasks()
    gym = [name for name in judges if name in SCORERS]
    questions = {name: list(judges[name].problems("train")[:20]) for name in [*gym, "last digit"]}
    names, weights = zip(*((kind, weight) for kind, (_, weight) in KINDS.items()), strict=True)
    for number in range(count):
        if number % 20 == 10:
            yield _right(rng, number)
            continue
        kind = names[number % len(names)] if number < 2 * len(names) else rng.choices(names, weights)[0]
        evaluating = gym[:9] if kind in ("code", "huge") else []
        name = rng.choice(["math"] * 6 + ["boxed", "exact", "pattern", "bomb", "last digit", *evaluating, *gym])
        answer = KINDS[kind][0](rng).replace("CANARY", canary).replace("PORT", str(port))
        # A scorer reads only the text between tags, so an answer elsewhere would not test it.
        wrap = rng.choice(WRAPS[-2:] if name in gym else WRAPS)
        problem = rng.choice(questions[name]) if name in questions else Problem(f"p{number}", "?", rng.choice(ANSWERS))
        yield Case(kind, name, problem, wrap.replace("ANSWER", answer))


def _right(rng: random.Random, number: int) -> Case:
    answer = rng.choice(ANSWERS)
    name = rng.choice(["math", "boxed", "exact", "pattern"])
    if name == "pattern":  # its regular expression captures a single word
        answer = ANSWERS[0]
    text = {"math": r"Hence \boxed{%s}.", "boxed": r"\boxed{ %s }", "exact": "%s", "pattern": "#### %s"}[name] % answer
    return Case("right", name, Problem(f"p{number}", "?", answer), text, right=True)


@dataclass
class KindResult:
    """Results for the completions of one kind."""

    count: int = 0
    right: int = 0
    faults: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    slowest: float = 0.0


class Trap:
    """Detects executed code: a file that must not appear, and a port that must get no connection."""

    def __init__(self) -> None:
        self.file = Path(tempfile.mkdtemp()) / "canary"
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self.port = int(self._socket.getsockname()[1])

    def triggered(self) -> bool:
        """Whether any code was executed."""
        with suppress(BlockingIOError):
            self._socket.accept()
            return True
        return self.file.exists()

    def close(self) -> None:
        self._socket.close()


def judged(
    given: Iterable[Case], timeout_s: float, memory_gb: float, workers: int
) -> Iterator[tuple[Case, Any, float]]:
    """The completions with their verdicts and the seconds that each took, without the start of the worker."""
    judges = tasks()
    todo = iter(given)
    lock = threading.Lock()

    def work() -> list[tuple[Case, Any, float]]:
        done = []
        with Verifier(judges["math"], 1, timeout_s, memory_gb) as first:
            verifiers = {name: first.for_task(task) for name, task in judges.items()}
            ready: set[str] = set()
            while True:
                with lock:
                    case = next(todo, None)
                if case is None:
                    return done
                verifier = verifiers[case.task]
                if case.task not in ready:  # loading a task has no time limit
                    verifier.submit(case.problem, "warm-up").result()
                    ready.add(case.task)
                start = time.perf_counter()
                verdict = verifier.submit(case.problem, case.completion).result()
                spent = time.perf_counter() - start
                done.append((case._replace(completion=case.completion[:150]), verdict, spent))
                if verdict.fault:  # the worker may have been replaced
                    ready.clear()

    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(work) for _ in range(workers)]:
            yield from future.result()


class Memory:
    """Monitors the worker processes: the peak memory of a single one, in bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.05):
            server = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
            for process in Path("/proc").glob("[0-9]*"):
                with suppress(OSError, KeyError):  # the process may have ended
                    if int((process / "stat").read_text().rpartition(")")[2].split()[1]) != server:
                        continue
                    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
                    self.peak = max(self.peak, int(status["VmHWM"].split()[0]) * 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5_000, help="number of completions")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--timeout", type=float, default=2.0, help="data.verifier_timeout_s")
    parser.add_argument("--memory", type=float, default=2.0, help="data.verifier_memory_gb")
    parser.add_argument("--workers", type=int, default=2, help="number of worker processes")
    parser.add_argument("--allowance", type=float, default=2.0, help="seconds that a verdict may exceed its limit by")
    args = parser.parse_args()
    trap = Trap()
    given = cases(args.count, args.seed, str(trap.file), trap.port)
    results: dict[str, KindResult] = defaultdict(KindResult)
    wrong: list[str] = []
    start = time.perf_counter()
    with Memory() as memory:
        for case, verdict, seconds in judged(given, args.timeout, args.memory, args.workers):
            row = results[case.kind]
            row.count += 1
            row.right += verdict.correct
            row.slowest = max(row.slowest, seconds)
            if verdict.fault:
                row.faults["time" if "time limit" in verdict.message else verdict.message.split(":")[0][:40]] += 1
            what = f"{case.kind} by {case.task}: {case.completion!r}: {verdict.message!r}"
            if verdict.correct != case.right:
                wrong.append(f"judged {'correct' if verdict.correct else 'wrong'}: {what}")
            if seconds > args.timeout + args.allowance:
                wrong.append(f"took {seconds:.1f} s: {what}")
            if verdict.fault and ("SystemExit" in verdict.message or "exit code" in verdict.message):
                wrong.append(f"ended its process: {what}")
    if memory.peak > (args.memory + 0.5) * 1e9:  # the limit excludes the memory at the start of a worker
        wrong.append(f"a worker held {memory.peak / 2**30:.2f} GiB")
    if trap.triggered():
        wrong.append("code in a completion was executed")
    spent = time.perf_counter() - start
    print("| kind | completions | correct | faults | slowest, s |\n| --- | --- | --- | --- | --- |")
    for kind, row in sorted(results.items()):
        faults = ", ".join(f"{n} {what}" for what, n in sorted(row.faults.items())) or "-"
        print(f"| {kind} | {row.count} | {row.right} | {faults} | {row.slowest:.2f} |")
    verdicts = sum(row.count for row in results.values())
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{verdicts} of {args.count} verdicts in {spent:.0f} s")
    print(f"peak memory of a worker {memory.peak / 2**30:.2f} GiB, of this process {own:.2f} GiB")
    print(f"{len(wrong)} violations", *wrong, sep="\n")
    return int(bool(wrong) or verdicts != args.count)


if __name__ == "__main__":
    sys.exit(main())
