"""Throughput and memory on one GPU: `python benchmarks/gpu.py` (about five minutes).

Needs only torch, transformers and lightning, and downloads nothing. The model has random weights and the shape of
Qwen3-0.6B: weights in float32, arithmetic in bfloat16 (`bf16-mixed`), rollouts from a bfloat16 copy. All rollouts have
full length, and a checksum counts about half of them as correct.

1. Epochs of GRPO and RLRT with the Python API: tokens per second in sampling, scoring and training, utilization of the
   GPU in training (MFU, 6 FLOP per weight and token, relative to the measured matmul rate), peak memory, and RLRT's
   time relative to GRPO's.
2. Forward and backward pass over two sequences of 2k, 8k and 16k tokens, with and without a padding mask: time and peak
   memory. With a causal mask no token attends to padding on its right, so both give the same values.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import Metrics, cell, epochs_of_ours, save, write_model

SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


@contextmanager
def measured(found: dict[str, float]) -> Iterator[None]:
    """Measures the time (s) and the peak of allocated memory (GB) of the block."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    yield
    torch.cuda.synchronize()
    found["seconds"] = time.perf_counter() - start
    found["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9


def matmul_rate() -> float:
    """FLOP/s of an 8192 x 8192 x 8192 product of random bfloat16 matrices, median of ten."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found: dict[str, float] = {}
    seconds = []
    for _ in range(13):
        with measured(found):
            a @ b
        seconds.append(found["seconds"])
    return 2 * 8192**3 / statistics.median(seconds[3:])


def epochs(model: str, method: Any, args: argparse.Namespace) -> list[Metrics]:
    torch.cuda.reset_peak_memory_stats()
    result = epochs_of_ours(
        model,
        method,
        args.prompts,
        8,
        args.tokens,
        args.epochs,
        micro_batches=args.micro_batches,
        fixed_length=True,
        learning_rate=0.0,
        precision="bf16-mixed",
    )
    for epoch in result:
        epoch["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.empty_cache()
    return result


def long_passes(model: Any, lengths: list[int], turns: int) -> dict[str, list[dict[str, float]]]:
    """Forward and backward pass through the decoder for two sequences, one of which has an eighth of padding."""
    found: dict[str, list[dict[str, float]]] = {}
    for length in lengths:
        ids = torch.randint(1, 1000, (2, length), device="cuda")
        mask = torch.ones_like(ids)
        mask[1, length - length // 8 :] = 0
        for _ in range(turns):
            for name, padding in {"mask": mask, "no mask": None}.items():
                one: dict[str, float] = {}
                with measured(one), torch.autocast("cuda", torch.bfloat16):
                    states = model.model(input_ids=ids, attention_mask=padding, use_cache=False).last_hidden_state
                    states[mask.bool()].float().square().mean().backward()
                model.zero_grad()
                found.setdefault(f"{length} {name}", []).append(one)
    return found


def table(head: str, rows: dict[str, list[dict[str, float]]], columns: dict[str, Callable[[Any], float]]) -> None:
    print(f"\n| {head} | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(cell([of(f) for f in row]) for of in columns.values())} |", flush=True)


def main() -> None:
    from rlrt_lightning import GRPO, RLRT

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16, help="prompts per epoch, with 8 rollouts each")
    parser.add_argument("--tokens", type=int, default=512, help="response length")
    parser.add_argument("--micro-batches", type=int, default=2, help="micro-batches per optimizer step")
    parser.add_argument("--epochs", type=int, default=2, help="measured epochs, after a warm-up epoch")
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 8192, 16384], help="sequence lengths")
    parser.add_argument("--turns", type=int, default=3, help="number of measurements of each length")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="number of layers")
    parser.add_argument("--out", help="JSON file for all measurements")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a GPU, but torch finds none")
    peak = matmul_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {peak / 1e12:.0f} TFLOP/s in bfloat16 matmuls")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), {**SHAPE, "num_hidden_layers": args.layers})
        found = {m.__class__.__name__: epochs(folder, m, args) for m in (GRPO(normalize_std=True), RLRT())}
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda()
    weights = sum(p.numel() for p in model.parameters())
    columns: dict[str, Callable[[Any], float]] = {
        "epoch, s": lambda f: f["seconds"],
        "rollout, s": lambda f: f["time/rollout"],
        "rescore, s": lambda f: f["time/rescore"],
        "teacher, s": lambda f: f["time/teacher"],
        "train, s": lambda f: f["time/train"],
        "sampled tokens/s": lambda f: f["speed/rollout_tokens_per_s"],
        "scored tokens/s": lambda f: f["speed/score_tokens_per_s"],
        "trained tokens/s": lambda f: f["speed/train_tokens_per_s"],
        "MFU of training": lambda f: 6 * weights * f["speed/train_tokens_per_s"] / peak,
        "mismatch, nats": lambda f: f["rollout/mismatch_mean"],
        "peak memory, GB": lambda f: f["memory_gb"],
    }
    table(f"{weights / 1e6:.0f} M weights", found, columns)
    times = {name: statistics.median(f["seconds"] for f in run) for name, run in found.items()}
    print(f"\nRLRT's epoch takes {times['RLRT'] / times['GRPO']:.2f} times as long as GRPO's")
    passes = long_passes(model, args.lengths, args.turns)
    table("forward and backward", passes, {"s": lambda f: f["seconds"], "GB": lambda f: f["memory_gb"]})
    save(args.out, {"epochs": found, "long": passes, "settings": vars(args), "peak_flops": peak})


if __name__ == "__main__":
    main()
