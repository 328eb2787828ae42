"""Tests a long run for leaks: `python benchmarks/soak.py`.

Trains the embedded task for many epochs in a separate process and samples its memory (including its children's), open
files, processes and threads. Prints the medians over the middle and the last third of the epochs. Exits with code 1 if
memory has grown by more than 2 %, or any of the others at all. Linux only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tree(pid: int) -> list[int]:
    """Ids of a process and all of its descendants."""
    children = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        children += [int(child) for child in (task / "children").read_text().split()]
    return [pid, *(p for child in children for p in tree(child))]


def sample(pid: int) -> dict[str, float]:
    """Current resources of a process and its descendants; memory in MB (10^6 bytes)."""
    page = os.sysconf("SC_PAGE_SIZE")
    found = {"memory": 0.0, "own memory": 0.0, "open files": 0.0, "processes": 0.0, "threads": 0.0}
    for p in tree(pid):
        resident = int(Path(f"/proc/{p}/statm").read_text().split()[1]) * page / 1e6
        found["memory"] += resident
        found["own memory"] += resident * (p == pid)
        found["open files"] += len(os.listdir(f"/proc/{p}/fd"))
        found["processes"] += 1
        found["threads"] += len(os.listdir(f"/proc/{p}/task"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=300, help="number of epochs")
    parser.add_argument("extra", nargs="*", help="further flags for the run, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rlrt_lightning", "fit", f"--config={ROOT / 'configs' / 'rlrt.yaml'}"]
        command += [f"--trainer.max_epochs={args.epochs}", f"--trainer.logger.save_dir={folder}"]
        command += ["--trainer.enable_progress_bar=false", *args.extra]
        output = Path(folder) / "output.txt"
        samples: list[tuple[int, dict[str, float]]] = []
        with output.open("w") as file:
            run = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file, stderr=file
            )
            while run.poll() is None:
                time.sleep(0.25)
                saved = [p.stem.split("-")[1] for p in Path(folder).glob("*/*/checkpoints/epoch-*.ckpt")]
                try:
                    samples.append((max(map(int, saved), default=0), sample(run.pid)))
                except (OSError, ProcessLookupError):  # a process ended in the meantime
                    continue
        if run.returncode:
            print(output.read_text()[-3000:])
            return 1
    third = args.epochs / 3
    middle = [found for epoch, found in samples if third <= epoch < 2 * third]
    last = [found for epoch, found in samples if epoch >= 2 * third]
    print(f"{args.epochs} epochs, {len(samples)} samples\n\n| | middle third | last third | ratio |")
    print("| --- | ---: | ---: | ---: |")
    grown = False
    for name in middle[0]:
        before, after = (statistics.median(found[name] for found in part) for part in (middle, last))
        grown |= after > before * (1.02 if "memory" in name else 1)
        print(f"| {name} | {before:.1f} | {after:.1f} | {after / before:.4f} |")
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
