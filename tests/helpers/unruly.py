"""A task whose verifier fails or misbehaves in the way that the completion names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from rlrt_lightning.tasks.base import Problem, Task, Verdict

PROBLEM = Problem("p", "question", answer="a")


HOARD = []


class UnprintableError(Exception):
    def __str__(self):
        sys.exit("no message")


class Unruly(Task):
    """Does what the completion names, as in `sleep:60`."""

    def __init__(self, name: str = "unruly") -> None:
        self.name = name

    def problems(self, split):
        return [PROBLEM]

    def verify(self, problem, completion):
        what, _, argument = completion.partition(":")
        if what == "sleep":
            time.sleep(float(argument))
        elif what == "power":
            return Verdict(float(9**9**9**9), True)
        elif what == "exit":
            os._exit(3)
        elif what == "sys.exit":
            sys.exit("gone")
        elif what == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif what == "raise":
            raise ValueError("one\ntwo " + "x" * 5000)
        elif what == "memory":
            bytearray(50_000_000_000)
        elif what == "unpicklable":
            return Verdict(1.0, True, answer=lambda: 0)
        elif what == "nan":
            return Verdict(float("nan"), True)
        elif what == "none":
            return None
        elif what == "long":
            return Verdict(1.0, True, answer="x" * 3_000_000, message="y" * 3_000_000, label="z" * 3_000_000)
        elif what == "pid":
            return Verdict(1.0, True, answer=str(os.getpid()))
        elif what == "child":
            child = subprocess.Popen(["sleep", "60"])
            Path(argument).write_text(str(child.pid))
            child.wait()
        elif what == "fork":
            os.fork()  # both processes return
            return Verdict(1.0, True, answer=argument)
        elif what == "chdir":
            os.chdir("/")
        elif what == "cwd":
            return Verdict(1.0, True, answer=os.getcwd())
        elif what == "thread":
            threading.Thread(target=time.sleep, args=(60,)).start()
        elif what == "print":
            print("x" * 3_000_000)
            sys.stdin.close()
        elif what == "hoard":
            HOARD.append(bytearray(int(argument)))
            return Verdict(1.0, True, answer=str(os.getpid()))
        elif what == "silent":
            raise UnprintableError
        elif what == "stop":  # like C code that never releases the interpreter
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        elif what == "recurse":
            return self.verify(problem, completion)
        return Verdict(1.0, True, answer=f"{self.name} {len(completion)}")
