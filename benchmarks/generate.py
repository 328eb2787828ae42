"""Our rollouts and transformers' `generate`: `python benchmarks/generate.py --model models/smollm2-135m-instruct`.

Both use the same weights, prompts and length limit, with natural stopping, in turns (A B A B ...) in one process;
`generate` gets the K copies of each prompt in one batch and returns the log-probs that training needs. Prints tokens
per second, the ratio, and our share of the hardware limit: each decoding step multiplies its active rows with all
weights and reads all weights once, at the peak FLOP/s and memory bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from common import matmul_weights, peak_bandwidth, peak_flops, question


def ours(policy: Any, prompts: list[list[int]], args: argparse.Namespace, turn: int) -> list[int]:
    from rlrt_lightning import Sampling, TransformersEngine

    engine = TransformersEngine()
    engine.sync(policy)
    seeds = [100 * turn + i for i in range(len(prompts))]
    rollouts = engine.generate(prompts, args.rollouts, Sampling(max_new_tokens=args.tokens), seeds)
    return [len(rollout.response_ids) for rollout in rollouts]


def transformers_generate(policy: Any, prompts: list[list[int]], args: argparse.Namespace, turn: int) -> list[int]:
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
    ends = torch.isin(tokens, torch.tensor(policy.end_tokens))
    return [int(n) for n in (ends.cumsum(1) - ends.long() == 0).sum(1)]


def bound(policy: Any, prompts: list[list[int]], lengths: list[int], rates: tuple[float, float]) -> float:
    """Lower bound of the time for prompts and responses of these lengths, in seconds."""
    flops, bandwidth = rates
    body, head = matmul_weights(policy.model)
    width = next(policy.model.parameters()).element_size()
    seconds = 2 * body * sum(map(len, prompts)) / flops
    for step in range(1, max(lengths)):
        rows = sum(length > step for length in lengths)
        seconds += max(2 * (body + head) * rows / flops, width * (body + head) / bandwidth)
    return seconds


def main() -> None:
    from rlrt_lightning import Policy

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or id of the model")
    parser.add_argument("--rollouts", type=int, default=8, help="rollouts for each of 8 prompts")
    parser.add_argument("--tokens", type=int, default=128, help="maximum response length")
    parser.add_argument("--turns", type=int, default=3, help="number of measurements of each sampler")
    args = parser.parse_args()
    policy = Policy(path=args.model)
    policy.load()
    prompts = [policy.encode_prompt(question(i)) for i in range(8)]
    samplers = {"ours": ours, "generate": transformers_generate}
    speeds: dict[str, list[float]] = {name: [] for name in samplers}
    rates = peak_flops(), peak_bandwidth()
    best: list[tuple[float, list[int]]] = []
    for turn in range(args.turns):
        for name, sample in samplers.items():
            start = time.perf_counter()
            lengths = sample(policy, prompts, args, turn)
            seconds = time.perf_counter() - start
            speeds[name].append(sum(lengths) / seconds)
            print(f"turn {turn + 1}, {name}: {sum(lengths)} tokens, {speeds[name][-1]:.0f} tokens/s", flush=True)
            if name == "ours":
                best.append((seconds, lengths))
        rates = max(rates[0], peak_flops()), max(rates[1], peak_bandwidth())
    print("\n| sampler | tokens/s, median (range) | relative to generate |\n| --- | --- | --- |")
    for name, speed in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(speed, speeds["generate"], strict=True))
        middle = statistics.median(speed)
        print(f"| {name} | {middle:.0f} ({min(speed):.0f} to {max(speed):.0f}) | {ratio:.2f} |")

    shares = [bound(policy, prompts, lengths, rates) / seconds for seconds, lengths in best]
    print(
        f"\nours reaches {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f}) of the limit "
        f"({rates[0] / 1e9:.0f} GFLOP/s, {rates[1] / 1e9:.1f} GB/s)"
    )


if __name__ == "__main__":
    main()
