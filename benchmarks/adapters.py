"""LoRA adapters in vLLM, separate or merged: `python benchmarks/adapters.py --model models/smollm2-135m-instruct`.

Both ways run in separate processes with the same prompts, in turns, with the colocated engine. Prints what a sync
sends, how long it takes, and how fast vLLM then samples. The first sync, which also sends the base weights, and a first
round of rollouts are not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from common import cell, in_turns, question, ratios, save
from torch import Tensor

from rlrt_lightning import LoRA, Policy, Sampling, VllmColocateEngine

WAYS = ("merged", "auto")
SYNCS = 3  # measured in each process


class CountingEngine(VllmColocateEngine):
    """Counts the bytes that it sends."""

    sent = 0

    def _send_weights(self, policy: Policy, weights: Iterator[tuple[str, Tensor]]) -> None:
        super()._send_weights(policy, map(self._count, weights))

    def _send_adapters(self, policy: Policy, weights: dict[str, Tensor]) -> None:
        super()._send_adapters(policy, dict(map(self._count, weights.items())))

    def _count(self, pair: tuple[str, Tensor]) -> tuple[str, Tensor]:
        self.sent += pair[1].numel() * pair[1].element_size()
        return pair


def train(policy: Policy, seed: int) -> None:
    """Changes the adapters as training would."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.requires_grad:
                weight.add_(1e-3 * torch.randn(weight.shape, generator=g).to(weight.device))


def measure(args: argparse.Namespace) -> dict[str, float]:
    policy = Policy(path=args.model, lora=LoRA(rank=args.rank))
    policy.load()
    engine = CountingEngine(dtype=args.dtype, max_rows=512, lora=args.way)
    prompts = [policy.encode_prompt(question(number)) for number in range(8)]

    def draw(n: int) -> int:
        rollouts = engine.generate(prompts, n, Sampling(max_new_tokens=args.tokens), list(range(len(prompts))))
        return sum(len(rollout.response_ids) for rollout in rollouts)

    engine.sync(policy)
    draw(1)
    seconds = []
    for number in range(SYNCS):
        train(policy, number)
        engine.sent, start = 0, time.perf_counter()
        engine.sync(policy)
        seconds.append(time.perf_counter() - start)
    draw(1)  # includes the check of the sync
    start = time.perf_counter()
    tokens = draw(args.rollouts)
    speed = tokens / (time.perf_counter() - start)
    return {"sent": engine.sent / 1e6, "sync": statistics.median(seconds), "speed": speed}


def table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = ["| adapters | sent, MB | sync, s | sync, relative | sampling, tokens/s | sampling, relative |"]
    lines.append("| --- | ---: | --- | --- | --- | --- |")
    values: dict[str, dict[str, Any]] = {
        way: {name: [turn[name] for turn in turns] for name in turns[0]} for way, turns in found.items()
    }
    merged = values["merged"]
    for way, own in values.items():
        cells = [f"{own['sent'][0]:.1f}", cell(own["sync"], 3), ratios(own["sync"], merged["sync"])]
        cells += [cell(own["speed"], 0), ratios(own["speed"], merged["speed"])]
        lines.append(f"| {'merged' if way == 'merged' else 'separate'} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or id of the model")
    parser.add_argument("--dtype", default="bfloat16", help="type of vLLM's weights")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--rollouts", type=int, default=8, help="rollouts for each of the 8 prompts")
    parser.add_argument("--tokens", type=int, default=64, help="maximum response length")
    parser.add_argument("--turns", type=int, default=3, help="number of measurements of each way")
    parser.add_argument("--out", help="also write the measurements to this file (JSON)")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args)), flush=True)
        os._exit(0)  # shutting down vLLM can take long
    found = in_turns(WAYS, args.turns, "way")
    save(args.out, {"turns": found, "settings": vars(args)})
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
