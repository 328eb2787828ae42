"""Memory and time of log-probs and entropy with a large vocabulary: `python benchmarks/log_probs.py`.

Compares the implementation used in training (logits in chunks, recomputed in the backward pass) with the plain one
(log_softmax of all logits), forward and backward through a head [V, H]; then the same with the divergence from a
teacher on the student's 100 most likely tokens. Each measurement runs in a separate process, in turns (A B A B ...).
Prints medians with the range. Memory is the increase of the process's peak.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

VARIANTS = ("plain", "chunks")
K = 100


def plain(states: Tensor, head: Tensor, targets: Tensor, top: Tensor, teacher: Tensor, distil: bool) -> Tensor:
    from rlrt_lightning.objective.divergences import divergence_on_support

    logp = (states @ head.T).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    loss = logp.gather(-1, targets[:, None])[:, 0].mean() + 0.1 * entropy.mean()
    if distil:
        loss = loss + divergence_on_support(logp.gather(-1, top), teacher, 0.5, tail=True).mean()
    return loss


def chunks(states: Tensor, head: Tensor, targets: Tensor, top: Tensor, teacher: Tensor, distil: bool) -> Tensor:
    from rlrt_lightning.objective.divergences import divergence_on_support
    from rlrt_lightning.policy.log_probs import in_chunks, log_probs_at

    def compute(logits: Tensor, targets: Tensor, top: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        tokens = torch.cat([targets[:, None], top], -1) if distil else targets[:, None]
        logp, entropy = log_probs_at(logits, tokens)
        loss = logp[:, 0] + 0.1 * entropy
        return (loss + divergence_on_support(logp[:, 1:], teacher, 0.5, tail=True) if distil else loss,)

    return in_chunks(compute, lambda part: part @ head.T, states, args.chunk, targets, top, teacher)[0].mean()


def measure(variant: Callable[..., Tensor]) -> None:
    """Measures one variant in this process."""
    torch.manual_seed(0)
    head = (torch.randn(args.vocabulary, args.hidden) / args.hidden**0.5).requires_grad_()
    states = torch.randn(args.tokens, args.hidden, requires_grad=True)
    targets = torch.randint(args.vocabulary, (args.tokens,))
    top = torch.randint(args.vocabulary, (args.tokens, K))
    teacher = torch.randn(args.tokens, K).log_softmax(-1) - 0.1
    head.grad, states.grad = torch.zeros_like(head), torch.zeros_like(states)  # the optimizer's, in both variants
    variant(states[:2], head, targets[:2], top[:2], teacher[:2], args.distil).backward()
    states.grad.zero_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    loss = variant(states, head, targets, top, teacher, args.distil)
    loss.backward()
    seconds = time.perf_counter() - start
    rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    result = {"gib": rise, "seconds": seconds, "loss": float(loss), "gradient": float(states.grad.norm())}
    print(json.dumps(result), flush=True)


def main() -> None:
    print("| values | plain, GiB | chunks, GiB | ratio | plain, s | chunks, s | ratio (range) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for what, flags in (("log-probs, entropy", []), ("and divergence", ["--distil"])):
        found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
        for _ in range(args.turns):
            for variant in VARIANTS:
                command = [sys.executable, __file__, *sys.argv[1:], *flags, "--variant", variant]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[variant].append(json.loads(done.stdout))
        a, b = found["plain"], found["chunks"]
        for name in ("loss", "gradient"):
            assert abs(a[0][name] - b[0][name]) <= 1e-5 * abs(a[0][name]), (name, a[0], b[0])
        times = [y["seconds"] / x["seconds"] for x, y in zip(a, b, strict=True)]
        memory = [statistics.median(f["gib"] for f in found[variant]) for variant in VARIANTS]
        seconds = [statistics.median(f["seconds"] for f in found[variant]) for variant in VARIANTS]
        print(
            f"| {what} | {memory[0]:.2f} | {memory[1]:.2f} | {memory[1] / memory[0]:.2f} | {seconds[0]:.1f} | "
            f"{seconds[1]:.1f} | {statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f}) |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936, help="vocabulary size V")
    parser.add_argument("--hidden", type=int, default=576, help="hidden size H")
    parser.add_argument("--tokens", type=int, default=2048, help="response tokens of the micro-batch")
    parser.add_argument("--chunk", type=int, default=256, help="model.policy.logits_chunk")
    parser.add_argument("--turns", type=int, default=3, help="number of measurements of each variant")
    parser.add_argument("--distil", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        measure({"plain": plain, "chunks": chunks}[args.variant])
    else:
        main()
