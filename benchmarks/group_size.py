"""Speed and padding by group size: `python benchmarks/group_size.py --model models/smollm2-135m-instruct`.

Epochs of RLRT with the same number of rollouts, in groups of K = 4, 8, 16 and 32, with natural stopping and learning
rate 0. Each K runs in a separate process, in turns; the first epoch of each process is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics

from common import Metrics, cell, epoch_parser, epochs_of_ours, in_turns, save

SIZES = ("4", "8", "16", "32")
COLUMNS = {
    "speed/train_tokens_per_s": "trained, tokens/s",
    "speed/score_tokens_per_s": "scored, tokens/s",
    "speed/train_padding": "padding in training",
    "speed/score_padding": "padding in scoring",
}


def measure(args: argparse.Namespace) -> list[Metrics]:
    from rlrt_lightning import RLRT

    k = int(args.size)
    shape = args.rollouts // k, k, args.tokens, args.epochs
    return epochs_of_ours(args.model, RLRT(), *shape, micro_batches=args.micro_batches, learning_rate=0.0)


def main() -> None:
    parser = epoch_parser(__doc__, "size", SIZES)
    parser.add_argument("--rollouts", type=int, default=64, help="rollouts per epoch")
    args = parser.parse_args()
    if args.size:
        print(json.dumps(measure(args)), flush=True)
        return
    found = in_turns(SIZES, args.turns, "size")
    save(args.out, {"epochs": found, "settings": vars(args)})
    print(f"| K | {' | '.join(COLUMNS.values())} |\n| --- |{' --- |' * len(COLUMNS)}")
    medians: dict[str, list[float]] = {tag: [] for tag in COLUMNS}
    for size, turns in found.items():
        cells = []
        for tag in COLUMNS:
            values = [statistics.median(f[tag] for f in turn) for turn in turns]
            medians[tag].append(statistics.median(values))
            cells.append(cell(values, 0) if tag.endswith("per_s") else f"{statistics.median(values):.1%}")
        print(f"| {size} | {' | '.join(cells)} |")
    for tag, name in COLUMNS.items():
        if tag.endswith("per_s"):
            spread = max(abs(value / statistics.median(medians[tag]) - 1) for value in medians[tag])
            print(f"\n{name}: within {spread:.0%} of the median over the sizes")


if __name__ == "__main__":
    main()
