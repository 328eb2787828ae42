"""Runs a task's `verify` on many completions: in worker processes with a time limit, or inline for a fast task.

Each worker process has its own pipe, served by a thread in this process. A worker that hangs or dies therefore affects
only its current completion. The processes are forked from a clean server process (or spawned), which does not inherit
this process's threads and accelerators.
"""

from __future__ import annotations

import faulthandler
import itertools
import math
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import weakref
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.tasks.base import Problem, Task, Verdict
from rlrt_lightning.tasks.sending import pickled, without_stdin_file

_START_TIMEOUT_S = 300.0  # for loading a task; imports can be slow on a shared file system
_MESSAGE_CHARS = 300
_ANSWER_CHARS = 1_000
_LABEL_CHARS = 100
_PIPE_BYTES = 4_096  # the smallest pipe capacity of any system

_keys = itertools.count()  # unique task keys in this process


class Verifier:
    """Judges completions of one task.

    Worker processes start with the first completion of an isolated task and run until `close`. A failure while judging
    a completion (`verify` raises, exceeds its time or memory limit, or its process dies) becomes a verdict with `fault`
    set and reward 0. A failure of the task itself (a worker cannot load it) raises a `ConfigError`.

    The processes limit time and memory only. A reward has the same access to files and the network as the run, each
    process that it starts has its own memory limit, and a detached process outlives the worker. No reward in this
    package executes code from a completion or a row; a custom reward that does must provide its own sandbox.

    Args:
        task: The task whose `verify` judges.
        workers: Number of worker processes.
        timeout_s: Time limit of one completion in seconds, from when a worker receives it.
        memory_gb: Memory limit of a worker in GB, on top of its memory after start-up. Linux only; no limit elsewhere.
    """

    def __init__(self, task: Task, workers: int = 4, timeout_s: float = 5.0, memory_gb: float = 4.0) -> None:
        if not isinstance(workers, int) or workers < 1:
            raise ConfigError(f"workers must be a whole number, 1 or more, not {workers!r}")
        for name, value in (("timeout_s", timeout_s), ("memory_gb", memory_gb)):
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be a positive number, not {value!r}")
        self._pool = _Pool(workers, float(timeout_s), int(memory_gb * 1e9))
        self._set_task(task)

    def for_task(self, task: Task) -> Verifier:
        """A verifier of another task that shares the worker processes. Closing either one stops them."""
        other = object.__new__(type(self))
        other._pool = self._pool
        other._set_task(task)
        return other

    def _set_task(self, task: Task) -> None:
        self.task = task
        self._key = next(_keys)
        self._pickled = pickled(task) if task.isolated else b""

    def submit(self, problem: Problem, completion: str) -> Future[Verdict]:
        """Submits one completion. Completions are judged in the order of submission.

        Args:
            problem: The problem that it tries to solve.
            completion: The text to judge.

        Returns:
            A future whose `result()` is the verdict.

        Raises:
            ConfigError: If the problem cannot be sent to a worker process.
        """
        future: Future[Verdict] = Future()
        if not self.task.isolated:
            future.set_result(_judge(self.task, problem, completion))
            return future
        try:
            payload = pickle.dumps((problem, completion))
        except Exception as error:
            raise ConfigError(f"the problem {problem.id!r} cannot be pickled: {_describe(error)}") from error
        self._pool.submit(_Job(future, self._key, self._pickled, payload))
        return future

    def close(self) -> None:
        """Stops the worker processes and cancels pending completions. A later `submit` starts new processes."""
        self._pool.close()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _judge(task: Task, problem: Problem, completion: str) -> Verdict:
    """Calls `verify`. Converts an exception to a fault, and the verdict's fields to plain values of limited size."""
    try:
        verdict = task.verify(problem, completion)
        if not isinstance(verdict, Verdict):
            raise TypeError(f"verify returned {type(verdict).__name__}, not a Verdict")
        reward = float(verdict.reward)
        if not math.isfinite(reward):
            raise ValueError(f"verify returned the reward {reward}")
        answer, label = verdict.answer, verdict.label
        rewards = {_clip(str(name), _LABEL_CHARS): float(value) for name, value in verdict.rewards.items()}
        return Verdict(
            reward=reward,
            correct=bool(verdict.correct),
            answer=None if answer is None else _clip(str(answer), _ANSWER_CHARS),
            message=_clip(str(verdict.message), _MESSAGE_CHARS),
            label=None if label is None else _clip(str(label), _LABEL_CHARS),
            fault=bool(verdict.fault),
            rewards=rewards,
        )
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a verifier that calls sys.exit() has also failed
        return _fault(_describe(error))


def _fault(message: str) -> Verdict:
    return Verdict(reward=0.0, correct=False, message=_clip(message, _MESSAGE_CHARS), fault=True)


def _describe(error: BaseException) -> str:
    """An exception in one line: its type and message."""
    try:
        text = " ".join(str(error)[: 4 * _MESSAGE_CHARS].split())
    except BaseException:
        text = ""
    return _clip(f"{type(error).__name__}: {text}" if text else type(error).__name__, _MESSAGE_CHARS)


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


# In this process


class _Job(NamedTuple):
    future: Future[Verdict]
    key: int  # of the task
    task: bytes  # pickled
    payload: bytes  # the pickled problem and completion


class _Pool:
    """The worker processes and their threads; both start with the first job."""

    def __init__(self, workers: int, timeout_s: float, memory: int) -> None:
        self._settings = (timeout_s, memory)
        self._workers = workers
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._stop: Any = None

    def submit(self, job: _Job) -> None:
        with self._lock:
            if self._stop is None:
                self._start()
            self._jobs.put(job)

    def _start(self) -> None:
        self._jobs = queue.SimpleQueue()
        workers = [_Worker(*self._settings) for _ in range(self._workers)]
        for number, worker in enumerate(workers):
            # A daemon thread without a reference to this pool, so that it blocks neither the interpreter's exit nor the
            # pool's garbage collection.
            threading.Thread(
                target=worker.serve, args=(self._jobs,), name=f"rlrt-verifier-{number}", daemon=True
            ).start()
        self._stop = weakref.finalize(self, _stop, self._jobs, workers)

    def close(self) -> None:
        with self._lock:
            if self._stop is not None:
                self._stop()
                self._stop = None


def _stop(jobs: queue.SimpleQueue[_Job | None], workers: list[_Worker]) -> None:
    """Stops the threads and processes of a pool when it is closed or garbage-collected, or the interpreter exits."""
    for worker in workers:
        worker.closing = True
    with suppress(queue.Empty):
        while True:
            job = jobs.get_nowait()
            if job is not None:
                job.future.cancel()
    for _ in workers:
        jobs.put(None)
    for worker in workers:
        worker.kill()  # its thread sees the end of the stream and cleans up


class _Worker:
    """One worker process, started on demand and replaced when it dies."""

    def __init__(self, timeout_s: float, memory: int) -> None:
        self.closing = False
        self._timeout_s = timeout_s
        self._memory = memory
        self._process: Any = None
        self._loaded: set[int] = set()
        self._lock = threading.Lock()  # the process may be started and killed in different threads

    def serve(self, jobs: queue.SimpleQueue[_Job | None]) -> None:
        """Runs the jobs; the target of this worker's thread."""
        while (job := jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                job.future.set_result(self._run(job))
            except BaseException as error:
                job.future.set_exception(error)
            del job  # frees the payload while waiting for the next job
        self._drop()

    def _run(self, job: _Job) -> Verdict:
        if self._process is None or not self._process.is_alive():  # it may have been killed while idle
            self._start()
        try:
            if job.key not in self._loaded:
                self._load(job)
            self._connection.send_bytes(pickle.dumps((job.key, None, self._timeout_s)))
            self._send(job.payload)
            if not self._connection.poll(self._timeout_s):
                self._drop()
                return self._fault_verdict(f"the verifier exceeded its time limit of {self._timeout_s:g} s")
            verdict, reusable = self._connection.recv()
        except (EOFError, OSError):
            return self._fault_verdict(f"the verifier's process died ({self._exit_status()})")
        if not reusable:
            self._drop()
        return verdict

    def _send(self, payload: bytes) -> None:
        """Sends a completion. If it exceeds the pipe's capacity, the send blocks until the process reads it, so a timer
        kills a process that does not."""
        if len(payload) <= _PIPE_BYTES:
            self._connection.send_bytes(payload)
            return
        timer = threading.Timer(self._timeout_s, self.kill)
        timer.daemon = True
        timer.start()
        try:
            self._connection.send_bytes(payload)
        finally:
            timer.cancel()

    def _load(self, job: _Job) -> None:
        try:
            self._connection.send_bytes(pickle.dumps((job.key, job.task, self._timeout_s)))
            ready = self._connection.poll(_START_TIMEOUT_S)
            problem = self._connection.recv() if ready else f"not ready after {_START_TIMEOUT_S:g} s"
        except (EOFError, OSError):
            problem = f"its process died ({self._exit_status()}); a script must start the verifier under " + (
                'if __name__ == "__main__":'
            )
        if problem:
            self._drop()
            if self.closing:
                raise RuntimeError("the verifier was closed")
            raise ConfigError(f"the verifier's worker could not load the task: {problem}")
        self._loaded.add(job.key)

    def _fault_verdict(self, message: str) -> Verdict:
        if self.closing:
            raise RuntimeError("the verifier was closed")
        return _fault(message)

    def _start(self) -> None:
        self._drop()
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        with self._lock:
            if self.closing:
                raise RuntimeError("the verifier was closed")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(
                target=_worker_main, args=(theirs, self._memory), name="rlrt-verifier", daemon=True
            )
            with without_stdin_file():
                self._process.start()
            theirs.close()  # without a copy in this process, the stream ends when the worker dies
            self._loaded = set()

    def _exit_status(self) -> str:
        self._process.join(1)
        code = self._process.exitcode
        return "still running" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """Kills the process and its child processes. May be called from any thread."""
        with self._lock:
            if self._process is not None and self._process.pid is not None:  # None: it could not be started
                try:
                    os.killpg(self._process.pid, signal.SIGKILL)
                except (AttributeError, OSError):  # no process groups on this system, no own group yet, or already dead
                    self._process.kill()

    def _drop(self) -> None:
        """Kills the process and releases its resources."""
        self.kill()
        with self._lock:
            if self._process is not None:
                self._process.join(1)
                self._connection.close()
                self._process = None


# In a worker process


def _worker_main(connection: Connection, memory: int) -> None:
    """Target of a worker process: loads tasks and judges completions until the stream ends."""
    with suppress(AttributeError, OSError):
        os.setsid()  # no Ctrl-C from the terminal, and it can be killed together with its children
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tasks: dict[int, Task] = {}
    limit: int | None = None
    process, folder, code = os.getpid(), os.curdir, 0
    with suppress(OSError):
        folder = os.getcwd()
    null = open(os.devnull, "w")  # noqa: SIM115 - stays open until the process exits
    try:
        while True:
            key, pickled, timeout_s = pickle.loads(connection.recv_bytes())
            if pickled is not None:
                connection.send(_load(tasks, key, pickled))
                continue
            payload = connection.recv_bytes()
            if limit is None:
                limit = _limit_memory(memory)
            # If the parent process is gone, nothing else would stop a hanging verifier.
            faulthandler.dump_traceback_later(2 * timeout_s + 10, exit=True, file=null)
            verdict = _judge_payload(tasks[key], payload)
            faulthandler.cancel_dump_traceback_later()
            if os.getpid() != process:  # a fork made by the verifier returned here; it must not send a second verdict
                break
            # A worker that ran out of memory may never free it and then fail all later completions. Libraries swallow
            # MemoryError, so check the memory itself as well.
            full = verdict.fault and verdict.message.startswith("MemoryError")
            connection.send((verdict, not full and _address_space() < limit - memory // 2))
            with suppress(OSError):
                os.chdir(folder)  # the next task is imported from here
    except (EOFError, OSError):
        pass
    except BaseException:
        code = 1
    os._exit(code)  # even if the verifier left threads running


def _address_space() -> int:
    """Size of this process's address space in bytes; 0 if it is unknown."""
    with suppress(ImportError, OSError):
        import resource

        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0]) * resource.getpagesize()
    return 0


def _limit_memory(extra: int) -> int:
    """Limits this process's address space to its current size plus `extra` bytes; returns the limit."""
    limit = _address_space() + extra
    if limit > extra:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        with suppress(OSError, ValueError):
            resource.setrlimit(
                resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
            )
    return limit


def _load(tasks: dict[int, Task], key: int, pickled: bytes) -> str | None:
    """Unpickles a task and warms it up; returns the error message if it fails."""
    try:
        tasks[key] = pickle.loads(pickled)
        tasks[key].warm_up()
    except BaseException as error:
        return _describe(error)
    return None


def _judge_payload(task: Task, payload: bytes) -> Verdict:
    """Judges a pickled problem and completion."""
    try:
        problem, completion = pickle.loads(payload)
    except BaseException as error:
        return _fault(_describe(error))
    return _judge(task, problem, completion)
