"""A full GRPO step, ours and TRL's: `python benchmarks/trl_step.py --model models/smollm2-135m-instruct`.

Both use the same weights, prompts, K, response length (no token ends a response), reward, optimizer and learning rate;
a step is one optimizer step on --prompts x 8 rollouts. TRL runs with its defaults (`plain`) and with the fastest
settings found on a CPU (`fast`): no gradient checkpointing, and as many rollouts per forward pass as ours. Each variant
runs in a separate process, in turns (A B C A B C ...); the first step of each process is not counted. Needs
`pip install -e '.[bench]'`.

Prints the median over all steps with the range, the ratio within each turn, and a lower bound of the step: the required
matmuls (each prompt read once for its K rollouts) at peak speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from typing import Any

import torch
from common import (
    Metrics,
    ask,
    cell,
    epochs_of_ours,
    in_turns,
    matmul_weights,
    peak_flops,
    ratios,
    right,
    save,
    trl_trainer,
)

K = 8
# By default glibc returns every large tensor to the system and faults it in again page by page.
KEEP_MEMORY = ":".join(
    f"glibc.malloc.{name}" for name in ("mmap_threshold=4000000000", "trim_threshold=8000000000", "top_pad=268435456")
)


def ours(args: argparse.Namespace) -> list[Metrics]:
    from rlrt_lightning import GRPO

    return epochs_of_ours(
        args.model, GRPO(), args.prompts, K, args.tokens, args.steps, args.dtype, args.micro_batches, fixed_length=True
    )


def trl(args: argparse.Namespace, **settings: Any) -> list[Metrics]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from rlrt_lightning import Policy

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times = list[float]()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())

    policy = Policy(path=args.model)
    tokenizer = AutoTokenizer.from_pretrained(policy.path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(policy.path, dtype=getattr(torch, args.dtype))
    chat = tokenizer.chat_template
    prompts = [
        [{"role": "user", "content": ask(args.model, i)}] if chat else ask(args.model, i) for i in range(args.prompts)
    ]
    clock = Clock()

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(right(c if isinstance(c, str) else c[0]["content"])) for c in completions]

    with tempfile.TemporaryDirectory() as folder:
        settings = {"generation_kwargs": {"min_new_tokens": args.tokens}, "max_steps": args.steps + 1, **settings}
        trainer = trl_trainer(model, tokenizer, prompts, reward, folder, K, args.tokens, callbacks=[clock], **settings)
        trainer.train()
    return [{"seconds": b - a} for a, b in zip(clock.times, clock.times[1:], strict=False)]


def measure(args: argparse.Namespace) -> list[Metrics]:
    rows = args.prompts * K
    if args.variant == "ours":
        return ours(args)
    if args.variant == "plain":
        return trl(args, gradient_accumulation_steps=rows // 8)  # micro-batches of 8 rollouts, TRL's default
    return trl(
        args,
        gradient_checkpointing=False,
        per_device_train_batch_size=rows // args.micro_batches,
        gradient_accumulation_steps=args.micro_batches,
    )


def bound(args: argparse.Namespace) -> tuple[float, float]:
    """FLOP of the step, and peak FLOP/s of the machine."""
    from rlrt_lightning import Policy

    policy = Policy(path=args.model)
    policy.load()
    prompts = sum(len(policy.encode_prompt(ask(args.model, i))) for i in range(args.prompts))
    body, head = matmul_weights(policy.model)
    responses = args.prompts * K * args.tokens
    sampled = 2 * body * (prompts + responses) + 2 * head * responses
    trained = 6 * body * (prompts + responses) + 6 * head * responses
    return sampled + trained, peak_flops(getattr(torch, args.dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="folder or id of the model (default: embedded)")
    parser.add_argument(
        "--dtype", default="float32", help="type of the weights of all variants (bfloat16 where it is fast)"
    )
    parser.add_argument("--prompts", type=int, default=8, help=f"prompts per step, with {K} rollouts each")
    parser.add_argument("--tokens", type=int, default=32, help="response length")
    parser.add_argument("--micro-batches", type=int, default=2, help="micro-batches per step (ours and `fast`)")
    parser.add_argument("--steps", type=int, default=2, help="measured steps per turn")
    parser.add_argument("--turns", type=int, default=3, help="number of measurements of each variant")
    parser.add_argument("--malloc", choices=("keep", "default"), default="keep", help="let glibc keep freed memory")
    parser.add_argument("--out", help="JSON file for all measurements")
    parser.add_argument("--variant", choices=("ours", "plain", "fast"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(measure(args)), flush=True)
        return
    if args.malloc == "keep":
        os.environ["GLIBC_TUNABLES"] = KEEP_MEMORY  # for the measuring processes
    operations, rate = bound(args)
    found = in_turns(("ours", "plain", "fast"), args.turns, "variant")
    rate = max(rate, bound(args)[1])
    save(args.out, {"steps": found, "operations": operations, "rate": rate, "settings": vars(args)})
    seconds = {name: [statistics.median(f["seconds"] for f in turn) for turn in turns] for name, turns in found.items()}
    print(f"{args.model}, {args.dtype}, {args.prompts} x {K} rollouts of {args.tokens} tokens, malloc {args.malloc}\n")
    print("| variant | seconds per step, median (range) | relative to ours |\n| --- | --- | --- |")
    names = {"ours": "ours", "plain": "TRL, defaults", "fast": "TRL, fastest settings"}
    for variant, name in names.items():
        print(f"| {name} | {cell(seconds[variant])} | {ratios(seconds[variant], seconds['ours'])} |")
    limit = operations / rate
    share = limit / statistics.median(seconds["ours"])
    peak = f"{operations / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s"
    print(f"| lower bound, matmuls at peak speed ({peak}) | {limit:.2f} | {share:.2f} |\n")
    for tag in ("sync", "rollout", "verify", "teacher", "train"):
        values = [f[f"time/{tag}"] for turn in found["ours"] for f in turn]
        print(f"ours, {tag}: {statistics.median(values):.2f} s")


if __name__ == "__main__":
    main()
