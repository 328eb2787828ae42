"""Time and peak memory of long sequences: `python benchmarks/long.py` (nine minutes per turn on a CPU).

Two rows, one of which has 4 % of padding on its right, pass through a model with random weights: in `scoring` forward
without gradients, in `training` forward and backward, both including the log-probs of the response tokens. Variants:

- ours, which passes no mask to the model: causal attention does not see padding on the right
- ours with the padding mask, for which transformers builds a mask [2, 1, T, T]
- TRL's GRPOTrainer, if TRL is installed (`pip install -e '.[bench]'`)

Each measurement runs in a separate process, in turns (A B C A B C ...), after a warm-up on short sequences. Memory is
the increase of the peak during the pass: of the process on a CPU, of the allocated memory on a GPU. All variants have
to give the same log-probs. On a GPU, set the size of a real model: --hidden 1024 --layers 28 --vocabulary 151936.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from common import cell, in_turns, memory_of_process, ratios, save, write_model

Sequences = list[tuple[list[int], list[int]]]
Pass = Callable[[Sequences], float]
"""Runs the measured pass and returns the sum of the response tokens' log-probs."""

PASSES = ("scoring", "training")
VARIANTS = {"ours": "ours", "mask": "ours with the mask", "trl": "TRL"}
PADDING = 0.04
PROMPT = 128


def two_rows(length: int, vocabulary: int) -> Sequences:
    """Prompts and responses of random tokens; the second row is 4 % shorter than the first."""
    random = torch.Generator().manual_seed(0)
    sizes = length, length - round(PADDING * length)
    rows = [torch.randint(1, vocabulary, (size,), generator=random).tolist() for size in sizes]
    return [(row[:PROMPT], row[PROMPT:]) for row in rows]


def our_pass(folder: str, args: argparse.Namespace, trains: bool, masked: bool) -> Pass:
    from rlrt_lightning import Policy
    from rlrt_lightning.policy.padding import pad_sequences

    policy = Policy(folder, score_tokens=10**9)
    policy.load()
    policy.to(args.device)
    if masked:
        states = policy._all_states
        policy._all_states = lambda mask, **inputs: states(mask, attention_mask=mask, **inputs)

    def run(sequences: Sequences) -> float:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            if not trains:
                return float(sum(logp.sum() for logp in policy.score(sequences)))
            total = policy.log_probs(*pad_sequences(sequences, policy.device))[0].sum()
        total.backward()
        return float(total.detach())

    return run


def trl_pass(folder: str, args: argparse.Namespace, trains: bool) -> Pass:
    from common import trl_trainer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlrt_lightning.policy.padding import pad_sequences

    tokenizer = AutoTokenizer.from_pretrained(folder, pad_token="<end>")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = {"gradient_checkpointing": False, "bf16": args.dtype == "bfloat16", "use_cpu": args.device == "cpu"}
    trainer = trl_trainer(model, tokenizer, ["w1"] * 8, lambda **_: [0.0] * 8, folder, 8, 1, **settings)

    def run(sequences: Sequences) -> float:
        ids, mask, response = pad_sequences(sequences, args.device)
        with torch.set_grad_enabled(trains):
            # Private, but it is the function that both scores and trains; no public one does.
            logp, *_ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, ids.shape[1] - PROMPT, compute_entropy=trains
            )
            total = (logp * response[:, PROMPT:]).sum()
        if trains:
            total.backward()
        return float(total.detach())

    return run


def peak_and_seconds(run: Callable[[], float], device: str) -> dict[str, float]:
    """Runs the pass and measures its time and the increase of the peak memory, in MB."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = memory_of_process("VmRSS")
    start = time.perf_counter()
    total = run()  # its result is read from the device, so all kernels but those of the backward pass are done
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else memory_of_process("VmHWM")
    return {"seconds": seconds, "mb": (peak - before) / 1e6, "total": total}


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Measures one case in this process."""
    name, variant, length = args.case.split("/")
    torch.set_num_threads(args.threads)
    shape = {
        "hidden_size": args.hidden,
        "intermediate_size": 3 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads // 2,
        "head_dim": args.hidden // args.heads,
        "vocab_size": args.vocabulary,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    trains = name == "training"
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), shape)
        run = trl_pass(folder, args, trains) if variant == "trl" else our_pass(folder, args, trains, variant == "mask")
        run(two_rows(2 * PROMPT, args.vocabulary))
        sequences = two_rows(int(length), args.vocabulary)
        return peak_and_seconds(lambda: run(sequences), args.device)


def check_same(found: dict[str, list[dict[str, float]]], tolerance: float) -> None:
    """Stops if a variant's log-probs differ from ours."""
    for case, turns in found.items():
        name, _, length = case.split("/")
        expected = found[f"{name}/ours/{length}"][0]["total"]
        if abs(turns[0]["total"] - expected) > tolerance * abs(expected):
            raise SystemExit(f"{case}: the log-probs sum to {turns[0]['total']}, ours to {expected}")


def print_tables(found: dict[str, list[dict[str, float]]], variants: list[str], lengths: list[int]) -> None:
    def values(name: str, variant: str, length: int, field: str) -> list[float]:
        return [turn[field] for turn in found[f"{name}/{variant}/{length}"]]

    others = [variant for variant in variants if variant != "ours"]
    columns = ["ours, s", *(f"{VARIANTS[v]}, relative" for v in others)]
    columns += ["ours, MB", *(f"{VARIANTS[v]}, relative" for v in others)]
    print(f"| pass | tokens | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 2)}")
    for name in PASSES:
        for length in lengths:
            cells = []
            for field, digits in (("seconds", 2), ("mb", 0)):
                ours = values(name, "ours", length, field)
                cells += [cell(ours, digits), *(ratios(values(name, v, length, field), ours) for v in others)]
            print(f"| {name} | {length:,} | {' | '.join(cells)} |")
    print("\nMemory per doubling of the length (2: linear, 4: quadratic, less: part of it is constant):")
    for short, long in pairwise(lengths):
        for name in PASSES:
            growth = []
            for variant in variants:
                first, last = (statistics.median(values(name, variant, n, "mb")) for n in (short, long))
                growth.append(f"{VARIANTS[variant]} {(last / first) ** (1 / math.log2(long / short)):.2f}")
            print(f"{name}, {short:,} to {long:,} tokens: {', '.join(growth)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 8192, 16384], help="tokens of the longer row")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size")
    parser.add_argument("--heads", type=int, default=4, help="attention heads; half as many have keys and values")
    parser.add_argument("--layers", type=int, default=2, help="number of layers")
    parser.add_argument("--vocabulary", type=int, default=16384, help="vocabulary size")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the arithmetic; default: bfloat16 on a GPU"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    parser.add_argument("--turns", type=int, default=1, help="number of measurements of each case")
    parser.add_argument("--out", help="JSON file for all measurements")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if min(args.lengths, default=0) <= 2 * PROMPT:
        raise SystemExit(f"--lengths: each has to be above {2 * PROMPT}")
    if args.case:
        print(json.dumps(measure(args)), flush=True)
        return
    variants = list(VARIANTS)
    if importlib.util.find_spec("trl") is None:
        print("TRL is not installed and is left out: pip install -e '.[bench]'")
        variants.remove("trl")
    cases = [f"{name}/{v}/{length}" for length in args.lengths for name in PASSES for v in variants]
    found = in_turns(cases, args.turns, "case")
    save(args.out, {"cases": found, "settings": vars(args)})
    check_same(found, 1e-4 if args.dtype == "float32" else 1e-2)
    print(f"{args.layers} layers of {args.hidden}, V = {args.vocabulary:,}, {args.dtype}, {args.device}\n")
    print_tables(found, variants, args.lengths)


if __name__ == "__main__":
    main()
