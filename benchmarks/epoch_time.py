"""How the time of an epoch is spent: `python benchmarks/epoch_time.py runs/last-digit/rlrt-0`.

Reads the times that every run logs (`time/`) and prints for each phase the median over epochs, the quartiles and its
share.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path


def main() -> None:
    from rlrt_lightning.analysis.events import scalars

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder with a run's TensorBoard events")
    curves = scalars(parser.parse_args().run)
    phases = {tag.removeprefix("time/"): dict(curve) for tag, curve in curves.items() if tag.startswith("time/")}
    steps = sorted(set().union(*phases.values()))  # an epoch after a validation has no sync
    phases["all"] = {step: sum(phase.get(step, 0.0) for phase in phases.values()) for step in steps}
    total = sum(phases["all"].values())
    print(f"{len(steps)} epochs\n\n| phase | median s | quartiles | share |\n| --- | --- | --- | --- |")
    for name, phase in phases.items():
        low, median, high = statistics.quantiles(phase.values(), n=4)
        print(f"| {name} | {median:.3f} | {low:.3f} to {high:.3f} | {sum(phase.values()) / total:.1%} |")


if __name__ == "__main__":
    main()
