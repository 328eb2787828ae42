"""Distribution shift (arXiv:2605.10781, Fig. 7): how much training has changed the policy at each position."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlrt_lightning.analysis.plots import panels, save, style
from rlrt_lightning.datamodule import RolloutDataModule
from rlrt_lightning.module import RLRTModule
from rlrt_lightning.objective import divergence
from rlrt_lightning.runtime.seeding import derive_seed

SHIFTED = 0.1
"""A position counts as shifted if its JS divergence exceeds this, in nats."""
MAX_TOP_K = 20
THRESHOLDS = (1e-1, 1e-2, 1e-3, 1e-4)
"""Probabilities under the base below which the fraction of shifted positions is reported."""


def compare_positions(trained: Tensor, base: Tensor) -> tuple[Tensor, ...]:
    """Compares two policies at each of C positions.

    Args:
        trained: Logits of the trained policy, [C, V].
        base: Logits of the base policy, [C, V].

    Returns:
        The JS divergence in nats, [C]; the trained policy's top-1 token, [C]; its probability under the base, [C];
        whether it is also the base's top-1 token, [C]; and the fraction of shared tokens among the top k of both, for
        k = 1 to K with K = min(20, V), [C, K].
    """
    js = divergence(trained, base, alpha=0.5)
    k = min(MAX_TOP_K, trained.shape[-1])
    ours, theirs = trained.topk(k, -1).indices, base.topk(k, -1).indices
    first = ours[:, 0]
    probability = base.softmax(-1).gather(-1, ours[:, :1])[:, 0]
    same = (ours[:, :, None] == theirs[:, None, :]).float()
    # Summed over both axes up to k: the number of tokens in the top k of both.
    common = same.cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2)
    overlap = common / torch.arange(1, k + 1, device=common.device)
    return js, first, probability, first == theirs[:, 0], overlap


def summarize(js: Tensor, probability: Tensor, overlap: Tensor) -> dict[str, float]:
    """The metrics of the three panels.

    Args:
        js: JS divergence in nats, [R].
        probability: Probability of the trained policy's top-1 token under the base, [R].
        overlap: Fraction of shared tokens among the top k, [R, K].
    """
    shifted = js > SHIFTED
    metrics: dict[str, float] = {
        "positions": float(len(js)),
        "shifted": float(shifted.double().mean()),
        "js_mean": float(js.mean()),
        "js_max": float(js.max()),
    }
    if shifted.any():
        metrics |= {f"overlap@{k + 1}": float(v) for k, v in enumerate(overlap[shifted].mean(0))}
        metrics |= {f"base_below_{t:g}": float((probability[shifted] < t).double().mean()) for t in THRESHOLDS}
    return metrics


@dataclass
class Shift:
    """Compares a trained policy with its initial model.

    Args:
        samples: Number of rollouts per problem.
        base: A module whose `model` is the initial model.
    """

    samples: int
    base: nn.Module

    def __call__(
        self, module: RLRTModule, data: RolloutDataModule, benchmark: str, limit: int | None, out: Path
    ) -> list[Path]:
        """Generates rollouts from the trained policy and compares both models on them; returns the written files."""
        spec = data.benchmarks[benchmark]
        problems = list(data.benchmark_problems(benchmark)[:limit])
        sampling = spec.sampling or data.sampling
        seeds = [derive_seed(data.seed, "shift", i) for i in range(len(problems))]
        rollouts = data.draw(spec.task or data.task, problems, self.samples, sampling, seeds)
        sequences = [(r.prompt_ids, r.response_ids) for r in rollouts]
        with data.computing():
            compared = module.policy.compare(
                compare_positions, sequences, sequences, self.base, sampling.temperature or 1.0
            )
        rows = [
            {
                "problem": problems[rollout.group].id,
                "sample": rollout.index,
                "position": position,
                "token": rollout.response_ids[position],
                "js": float(js[position]),
                "top1": int(first[position]),
                "base_probability": float(probability[position]),
                "same_top1": bool(same[position]),
                "overlap": overlap[position].tolist(),
            }
            for rollout, (js, first, probability, same, overlap) in zip(rollouts, compared, strict=True)
            for position in range(len(rollout.response_ids))
        ]
        js, _, probability, _, overlap = (torch.cat(parts) for parts in zip(*compared, strict=True))
        return self._write(rows, js, probability, overlap, out)

    def _write(
        self, rows: list[dict[str, Any]], js: Tensor, probability: Tensor, overlap: Tensor, out: Path
    ) -> list[Path]:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out / "shift.parquet")
        metrics = summarize(js, probability, overlap)
        with (out / "shift_summary.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("figure", "value"), *metrics.items()])
        return [out / "shift.parquet", out / "shift_summary.csv", *plot(metrics, js, overlap, out)]


def plot(metrics: dict[str, float], js: Tensor, overlap: Tensor, out: Path) -> list[Path]:
    """Plots the three panels, also from the columns of a kept shift.parquet; returns the written files.

    Args:
        metrics: As of `summarize`.
        js: JS divergence in nats, [R].
        overlap: Fraction of shared tokens among the top k, [R, K].
        out: The folder for shift.png and shift.svg.
    """
    titles = ["shift by position", "top-k overlap of shifted positions", "base probability of the new top-1"]
    figure, (first, second, third) = panels(titles)
    look = style(0)
    ranked = js.sort().values.clamp(min=1e-6)
    remaining = 1 - torch.arange(len(ranked)) / len(ranked)
    first.step(ranked, remaining, color=look.color, where="post", linewidth=1.3)
    first.axvline(SHIFTED, color="0.4", linewidth=0.8, linestyle=":")
    first.set_xscale("log")
    first.set_yscale("log")
    first.set_xlabel("JS(trained, base) (nats)")
    first.set_ylabel("fraction of positions above")
    if "overlap@1" in metrics:
        ks = range(1, overlap.shape[1] + 1)
        second.plot(ks, [metrics[f"overlap@{k}"] for k in ks], color=look.color, marker=look.marker, ms=3, lw=1.2)
        shares = [100 * metrics[f"base_below_{t:g}"] for t in THRESHOLDS]
        third.bar(range(len(THRESHOLDS)), shares, color=look.color)
    second.set_xlabel(f"k   ({int((js > SHIFTED).sum())} positions with JS > {SHIFTED})")
    second.set_ylabel("shared tokens / k")
    second.set_ylim(0, 1.02)
    second.set_xticks([1, 5, 10, 15, 20])
    third.set_xticks(range(len(THRESHOLDS)), [f"{t:g}" for t in THRESHOLDS])
    third.set_xlabel("base probability below")
    third.set_ylabel("shifted positions (%)")
    return save(figure, out, "shift")
