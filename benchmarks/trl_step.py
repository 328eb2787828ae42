"""A whole GRPO step, ours and TRL's: `python benchmarks/trl_step.py --model models/smollm2-135m-instruct`.

The same weights, prompts, K, response length (no token ends a response), reward, optimizer and learning rate; one
optimizer step of --prompts x 8 rollouts. TRL as it comes (`plain`) and at the fastest setting that was found to run
on a CPU (`fast`): no gradient checkpointing, and as many rollouts in a forward pass as ours has. Each side runs in a
process of its own, in turns (A B C A B C ...); the first step of each is not counted. Needs
`pip install -e '.[bench]'`.

Prints the median over all steps with the range, the ratio within each turn, and the arithmetic bound of the step: the
products that it cannot do without (a prompt read once for its K rollouts), at the best rate that this machine shows.
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
    Figures,
    arithmetic_rate,
    ask,
    cell,
    epochs_of_ours,
    in_turns,
    ratios,
    right,
    save,
    weights_in_products,
)

K = 8
# glibc gives every large tensor back to the system, and takes it again page by page.
KEEP_MEMORY = ":".join(
    f"glibc.malloc.{name}" for name in ("mmap_threshold=4000000000", "trim_threshold=8000000000", "top_pad=268435456")
)


def ours(args: argparse.Namespace) -> list[Figures]:
    from rlrt_lightning import GRPO

    return epochs_of_ours(
        args.model, GRPO(), args.prompts, K, args.tokens, args.steps, args.dtype, args.micro_batches, forced=True
    )


def trl(args: argparse.Namespace, **settings: Any) -> list[Figures]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

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
        config = GRPOConfig(
            output_dir=folder,
            num_generations=K,
            max_completion_length=args.tokens,
            generation_kwargs={"min_new_tokens": args.tokens},
            max_steps=args.steps + 1,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            loss_type="dapo",
            epsilon_high=0.28,
            **settings,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    return [{"seconds": b - a} for a, b in zip(clock.times, clock.times[1:], strict=False)]


def measure(args: argparse.Namespace) -> list[Figures]:
    rows = args.prompts * K
    if args.way == "ours":
        return ours(args)
    if args.way == "plain":
        return trl(args, gradient_accumulation_steps=rows // 8)  # of 8 rollouts each, as it comes
    return trl(
        args,
        gradient_checkpointing=False,
        per_device_train_batch_size=rows // args.micro_batches,
        gradient_accumulation_steps=args.micro_batches,
    )


def bound(args: argparse.Namespace) -> tuple[float, float]:
    """Operations of the step, and those per second that the machine can do."""
    from rlrt_lightning import Policy

    policy = Policy(path=args.model)
    policy.load()
    prompts = sum(len(policy.encode_prompt(ask(args.model, i))) for i in range(args.prompts))
    body, head = weights_in_products(policy.model)
    responses = args.prompts * K * args.tokens
    drawn = 2 * body * (prompts + responses) + 2 * head * responses
    trained = 6 * body * (prompts + responses) + 6 * head * responses
    return drawn + trained, arithmetic_rate(getattr(torch, args.dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="folder or id of the model; embedded")
    parser.add_argument(
        "--dtype", default="float32", help="type of the weights on all sides (bfloat16 where it is fast)"
    )
    parser.add_argument("--prompts", type=int, default=8, help=f"prompts of a step, with {K} rollouts each")
    parser.add_argument("--tokens", type=int, default=32, help="length of each response")
    parser.add_argument("--micro-batches", type=int, default=2, help="of a step, for ours and for TRL's fast setting")
    parser.add_argument("--steps", type=int, default=2, help="steps of each turn that are counted")
    parser.add_argument("--turns", type=int, default=3, help="how often each side is measured")
    parser.add_argument("--malloc", choices=("keep", "default"), default="keep", help="whether glibc keeps memory")
    parser.add_argument("--out", help="file for all figures, as JSON")
    parser.add_argument("--way", choices=("ours", "plain", "fast"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args)), flush=True)
        return
    if args.malloc == "keep":
        os.environ["GLIBC_TUNABLES"] = KEEP_MEMORY  # of the processes that measure
    operations, rate = bound(args)
    found = in_turns(("ours", "plain", "fast"), args.turns, "way")
    rate = max(rate, bound(args)[1])
    save(args.out, {"figures": found, "operations": operations, "rate": rate, "settings": vars(args)})
    seconds = {way: [statistics.median(f["seconds"] for f in turn) for turn in turns] for way, turns in found.items()}
    print(f"{args.model}, {args.dtype}, {args.prompts} x {K} rollouts of {args.tokens} tokens, malloc {args.malloc}\n")
    print("| side | seconds a step, median (range) | times ours |\n| --- | --- | --- |")
    names = {"ours": "ours", "plain": "TRL, as it comes", "fast": "TRL, fastest"}
    for way, name in names.items():
        print(f"| {name} | {cell(seconds[way])} | {ratios(seconds[way], seconds['ours'])} |")
    limit = operations / rate
    print(f"| arithmetic bound ({operations / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s) | {limit:.2f} | ", end="")
    print(f"{limit / statistics.median(seconds['ours']):.2f} |\n")
    for tag in ("sync", "rollout", "verify", "teacher", "train"):
        values = [f[f"time/{tag}"] for turn in found["ours"] for f in turn]
        print(f"ours, {tag}: {statistics.median(values):.2f} s")


if __name__ == "__main__":
    main()
