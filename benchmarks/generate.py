"""Our roll-outs against transformers' `generate`: `python benchmarks/generate.py --model models/smollm2-135m-instruct`.

The same weights, prompts and length limit, natural stopping, in turns (A B A B ...) in one process; `generate` has the
K copies of each prompt in one batch and gives back the log-probs that training needs. Prints tokens per second and the
ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

QUESTIONS = [f"What is {a} + {7 * a % 13}? Explain it in a few sentences." for a in range(3, 11)]


def ours(policy: Any, prompts: list[list[int]], args: argparse.Namespace, turn: int) -> int:
    from rlrt_lightning import Sampling, TransformersEngine

    engine = TransformersEngine()
    engine.sync(policy)
    seeds = [100 * turn + i for i in range(len(prompts))]
    return sum(
        len(r.response_ids)
        for r in engine.generate(prompts, args.rollouts, Sampling(max_new_tokens=args.tokens), seeds)
    )


def theirs(policy: Any, prompts: list[list[int]], args: argparse.Namespace, turn: int) -> int:
    torch.manual_seed(turn)
    longest = max(map(len, prompts))
    rows = [prompt for prompt in prompts for _ in range(args.rollouts)]
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    with policy.evaluating() as model:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=args.tokens,
            eos_token_id=policy.end_tokens,
            pad_token_id=policy.end_tokens[0],
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = out.sequences[:, longest:]
        for step, logits in enumerate(out.logits):
            logits.float().log_softmax(-1).gather(-1, tokens[:, step : step + 1])
    ended = torch.isin(tokens, torch.tensor(policy.end_tokens)).cumsum(1)
    return int(((ended == 0) | ((ended == 1) & torch.isin(tokens, torch.tensor(policy.end_tokens)))).sum())


def main() -> None:
    from rlrt_lightning import Policy

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or id of the model")
    parser.add_argument("--rollouts", type=int, default=8, help=f"roll-outs of each of the {len(QUESTIONS)} prompts")
    parser.add_argument("--tokens", type=int, default=128, help="longest response")
    parser.add_argument("--turns", type=int, default=3, help="how often each is measured")
    args = parser.parse_args()
    policy = Policy(path=args.model)
    policy.load()
    prompts = [policy.encode_prompt(q) for q in QUESTIONS]
    ways = {"ours": ours, "generate": theirs}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.turns):
        for name, way in ways.items():
            start = time.perf_counter()
            tokens = way(policy, prompts, args, turn)
            speeds[name].append(tokens / (time.perf_counter() - start))
            print(f"turn {turn + 1}, {name}: {tokens} tokens, {speeds[name][-1]:.0f} tokens/s", flush=True)
    print("\n| sampler | tokens/s, median (range) | of generate |\n| --- | --- | --- |")
    for name, speed in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(speed, speeds["generate"], strict=True))
        middle = statistics.median(speed)
        print(f"| {name} | {middle:.0f} ({min(speed):.0f} to {max(speed):.0f}) | {ratio:.2f} |")


if __name__ == "__main__":
    main()
