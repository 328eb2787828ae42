"""Where an epoch's time goes: `python benchmarks/epoch_time.py runs/rlrt/version_0`.

Reads the phases that every run logs and prints, for each, the median over epochs, the quartiles and the share.
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
    phases = {
        tag.removeprefix("time/"): [value for _, value in curve]
        for tag, curve in curves.items()
        if tag.startswith("time/")
    }
    total = [sum(epoch) for epoch in zip(*phases.values(), strict=True)]
    print(f"{len(total)} epochs\n\n| phase | median s | quartiles | share |\n| --- | --- | --- | --- |")
    for name, seconds in [*phases.items(), ("all", total)]:
        low, _, high = statistics.quantiles(seconds, n=4)
        share = sum(seconds) / sum(total)
        print(f"| {name} | {statistics.median(seconds):.3f} | {low:.3f} to {high:.3f} | {share:.1%} |")


if __name__ == "__main__":
    main()
