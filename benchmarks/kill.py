"""Tests exact resume by killing a run repeatedly: `python benchmarks/kill.py`.

Trains the embedded task twice: once without interruption, and once with SIGKILL at random moments in all phases and a
resume with `--ckpt_path last` after each. Prints in which phases the kills fell, and compares bit for bit everything
that both logged (except times and speeds), their samples, and the final weights and optimizer states. Exits with code 1
if they differ.

The teacher is a moving average, and lam decays. Each run is a fork of this process, because importing takes longer than
these epochs.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = [
    f"--config={ROOT / 'configs' / 'rlrt.yaml'}",
    "--data.prompts_per_epoch=8",
    "--data.benchmarks.heldout.limit=6",
    "--data.benchmarks.longer.limit=3",
    "--trainer.check_val_every_n_epoch=3",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.enable_progress_bar=false",
    "--teacher_refresh.every_n_epochs=2",
    "--teacher_refresh.ema_decay=0.5",
    "--model.method.lam_decay_steps=30",
    "--reversed_signal.picture_every_n_epochs=3",
]
# "between" is outside all other phases.
PHASES = ["rollout", "verify", "teacher", "update", "checkpoint", "validation", "between"]


def announce(write: Callable[[str], Any]) -> None:
    """Wraps the functions of each phase so that they report when the phase begins and ends."""
    from rlrt_lightning import RLRTModule, RolloutDataModule, TransformersEngine
    from rlrt_lightning.epoch import make
    from rlrt_lightning.runtime.checkpoints import WholeCheckpointIO
    from rlrt_lightning.teacher import Teacher

    inside: list[str] = []

    @contextmanager
    def in_phase(phase: str) -> Iterator[None]:
        if inside:  # the rollouts of a validation
            yield
            return
        inside.append(phase)
        write(phase)
        try:
            yield
        finally:
            inside.clear()
            write("between")

    def wrap(owner: Any, name: str, phase: str) -> None:
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def reported(*args: Any, **kwargs: Any) -> Any:
            with in_phase(phase):
                return plain(*args, **kwargs)

        setattr(owner, name, reported)

    generate = TransformersEngine.generate

    @functools.wraps(generate)  # the command line inspects its signature
    def reported_generate(self: Any, *args: Any) -> Any:
        with in_phase("rollout"):
            yield from generate(self, *args)

    TransformersEngine.generate = reported_generate  # type: ignore[method-assign]
    wrap(make, "collect_verdicts", "verify")
    wrap(Teacher, "score", "teacher")
    wrap(RLRTModule, "training_step", "update")
    wrap(RolloutDataModule, "_evaluate", "validation")
    wrap(WholeCheckpointIO, "save_checkpoint", "checkpoint")


class Run:
    """A run in a separate process, and the phases that it reports."""

    def __init__(self, words: list[str], log: Path) -> None:
        out, into = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(out)
            with log.open("ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            code, sys.argv = 1, sys.argv[:1]
            try:
                announce(lambda phase: bool(os.write(into, f"{phase} {time.monotonic()}\n".encode())))
                from rlrt_lightning.__main__ import main as command_line

                code = command_line(words)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(into)
        self._pipe, self._rest = out, b""
        self.phases: list[tuple[str, float]] = []

    def read(self) -> bool:
        """Waits for the run's next report; False when it has ended."""
        more = os.read(self._pipe, 65536)
        *lines, self._rest = (self._rest + more).split(b"\n")
        for line in lines:
            phase, begin = line.decode().split()
            self.phases.append((phase, float(begin)))
        return bool(more)

    def wait_for(self, phase: str, count: int) -> bool:
        """Waits until a phase has begun `count` times; False if the run ends first."""
        while sum(name == phase for name, _ in self.phases) < count:
            if not self.read():
                return False
        return True

    def kill(self) -> str:
        """Kills the run and returns its current phase."""
        os.kill(self.pid, signal.SIGKILL)
        while self.read():
            pass
        os.waitpid(self.pid, 0)
        os.close(self._pipe)
        return self.phases[-1][0]

    def finish(self) -> int:
        """Waits for the end of the run and returns its exit code."""
        while self.read():
            pass
        os.close(self._pipe)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def lengths(self) -> dict[str, float]:
        """Median duration of each phase, in seconds."""
        times: dict[str, list[float]] = {}
        for (phase, begin), (_, end) in itertools.pairwise(self.phases):
            times.setdefault(phase, []).append(end - begin)
        return {phase: statistics.median(values) for phase, values in times.items()}


def logged(folder: Path) -> tuple[dict[tuple[str, int], Any], int]:
    """All that the processes of a run have logged, by tag and step, and at how many places two do not agree."""
    from rlrt_lightning.analysis.events import event_log

    found: dict[tuple[str, int], Any] = {}
    differ = 0
    for file in sorted(folder.glob("*/*/events.out.tfevents.*")):
        log = event_log(file, "scalars", "images", "histograms", "tensors")
        tags = log.Tags()
        events = [(tag, e.step, e.value) for tag in tags["scalars"] for e in log.Scalars(tag)]
        events += [(tag, e.step, e.encoded_image_string) for tag in tags["images"] for e in log.Images(tag)]
        events += [(tag, e.step, e.histogram_value) for tag in tags["histograms"] for e in log.Histograms(tag)]
        texts = [(tag, e) for tag in tags["tensors"] for e in log.Tensors(tag)]
        events += [(tag, e.step, e.tensor_proto.SerializeToString()) for tag, e in texts]
        for tag, step, value in events:
            if not tag.startswith(("time/", "speed/")):
                differ += found.setdefault((tag, step), value) != value
    return found, differ


def final(folder: Path) -> dict[str, Any]:
    """All tensors of the newest checkpoint on which training depends, by name."""
    import torch

    from rlrt_lightning.runtime.checkpoints import newest

    checkpoint = torch.load(str(newest([folder], [], resume=True)), weights_only=True)
    tensors = dict(checkpoint["state_dict"])
    for number, state in checkpoint["optimizer_states"][0]["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    data = checkpoint["RolloutDataModule"]
    return {**tensors, "step": torch.tensor(checkpoint["global_step"]), "cursor": torch.tensor(data["cursor"])}


def differences(whole: Path, cut: Path) -> list[str]:
    """Lists the differences between two folders of runs."""
    import torch

    (expected, _), (got, differ) = logged(whole), logged(cut)
    wrong = [f"{differ} values that were logged twice differ"] if differ else []
    places = expected.keys() | got.keys()
    wrong += [f"{tag} at step {step}" for tag, step in places if expected.get((tag, step)) != got.get((tag, step))]
    ours, theirs = final(whole), final(cut)
    wrong += [name for name in ours.keys() | theirs.keys() if not torch.equal(ours[name], theirs[name])]
    print(f"compared {len(expected)} logged values and {len(ours)} tensors")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of kills")
    parser.add_argument("--epochs", type=int, default=24, help="number of epochs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    parser.add_argument("--phases", nargs="+", default=PHASES, choices=PHASES, help="phases, in turn (default: all)")
    parser.add_argument("--out", type=Path, help="folder for the runs (default: a temporary folder)")
    parser.add_argument("extra", nargs="*", help="further flags for every run, after --")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="rlrt-kill-"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    import rlrt_lightning.cli.commands  # noqa: F401 - imported once for all forks

    def words(folder: Path, *more: str) -> list[str]:
        own = [f"--trainer.logger.save_dir={folder}", f"--trainer.max_epochs={args.epochs}"]
        return ["fit", *SETTINGS, *own, *args.extra, *more]

    whole, cut, log = out / "whole", out / "cut", out / "output.txt"
    out.mkdir(parents=True, exist_ok=True)
    run = Run(words(whole), log)
    if run.finish():
        print(log.read_text()[-3000:])
        return 1
    lengths = run.lengths()
    print("phases, s:", ", ".join(f"{name} {lengths[name]:.4f}" for name in PHASES))

    moments = random.Random(args.seed)
    killed: Counter[str] = Counter()
    ended = False
    while not ended:
        resume = ["--ckpt_path=last"] if list(cut.glob("*/*/checkpoints/*.ckpt")) else []
        run = Run(words(cut, *resume), log)
        if sum(killed.values()) < args.kills:
            phase = args.phases[sum(killed.values()) % len(args.phases)]
            # The first to third occurrence of the phase; of the four updates per epoch the second, fourth or sixth.
            if run.wait_for(phase, moments.choice([1, 2, 3]) * (2 if phase in ("update", "between") else 1)):
                time.sleep(moments.random() * lengths[phase])
                killed[run.kill()] += 1
                continue
        code = run.finish()
        if code:
            print(log.read_text()[-3000:])
            return 1
        ended = True
    print("killed in:", ", ".join(f"{name} {count}" for name, count in killed.most_common()))
    wrong = differences(whole, cut)
    if wrong:
        print(f"{sum(killed.values())} kills: {len(wrong)} differences, such as {wrong[:5]}; see {out}")
        return 1
    print(f"{sum(killed.values())} kills: the same bit for bit")
    if not args.out:
        shutil.rmtree(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
