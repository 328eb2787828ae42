"""Epoch time of RLRT and GRPO: `python benchmarks/rlrt_over_grpo.py --model models/smollm2-135m-instruct`.

Both methods use the same rollouts (learning rate 0, the same seeds), about half of them correct, with natural stopping.
Each method runs in a separate process, in turns (A B A B ...); the first epoch of each process is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics

from common import Metrics, cell, epoch_parser, epochs_of_ours, in_turns, ratios, save

METHODS = ("GRPO", "RLRT")
PHASES = ("sync", "rollout", "verify", "teacher", "train")


def measure(args: argparse.Namespace) -> list[Metrics]:
    from rlrt_lightning import GRPO, RLRT

    method = RLRT() if args.method == "RLRT" else GRPO(normalize_std=True)
    shape = args.prompts, args.rollouts, args.tokens, args.epochs
    return epochs_of_ours(args.model, method, *shape, micro_batches=args.micro_batches, learning_rate=0.0)


def main() -> None:
    parser = epoch_parser(__doc__, "method", METHODS)
    parser.add_argument("--prompts", type=int, default=8, help="prompts per epoch")
    parser.add_argument("--rollouts", type=int, default=8, help="rollouts per prompt, K")
    args = parser.parse_args()
    if args.method:
        print(json.dumps(measure(args)), flush=True)
        return
    found = in_turns(METHODS, args.turns, "method")
    save(args.out, {"epochs": found, "settings": vars(args)})
    seconds = {name: [statistics.median(f["seconds"] for f in turn) for turn in turns] for name, turns in found.items()}
    every = {name: [f for turn in turns for f in turn] for name, turns in found.items()}
    correct, length = (statistics.mean(f[f"rollout/{tag}"] for f in every["RLRT"]) for tag in ("correct", "length"))
    print(f"{correct:.0%} of the rollouts are correct; mean length {length:.0f} tokens")
    print(f"\n| method | seconds per epoch, median (range) | relative to GRPO | {', s | '.join(PHASES)}, s |")
    print("| --- | --- | --- |" + " --- |" * len(PHASES))
    for name in found:
        phases = [statistics.median(f[f"time/{phase}"] for f in every[name]) for phase in PHASES]
        cells = [name, cell(seconds[name]), ratios(seconds[name], seconds["GRPO"]), *(f"{s:.2f}" for s in phases)]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
