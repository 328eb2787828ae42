"""Distribution shift (arXiv:2605.10781, Fig. 7): how far training has moved the policy, position by position."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlrt_lightning.analysis.figures import panels, save, style
from rlrt_lightning.datamodule import RolloutDataModule
from rlrt_lightning.module import RLRTModule
from rlrt_lightning.objective import divergence
from rlrt_lightning.runtime.seeding import derive_seed

SHIFTED = 0.1
"""Positions count as shifted from a JS divergence of more than this, in nats."""
TOP = 20
UNLIKELY = (1e-1, 1e-2, 1e-3, 1e-4)


def compare_positions(trained: Tensor, base: Tensor) -> tuple[Tensor, ...]:
    """Two policies at each of C positions, from their logits [C, V].

    Returns:
        JS divergence in nats, [C]; the trained policy's likeliest token, [C]; that token's probability under the base,
        [C]; whether that token is the base's likeliest too, [C]; the share of the k likeliest tokens that they have in
        common for k = 1 to 20 (or V), [C, k].
    """
    js = divergence(trained, base, alpha=0.5)
    k = min(TOP, trained.shape[-1])
    ours, theirs = trained.topk(k, -1).indices, base.topk(k, -1).indices
    first = ours[:, 0]
    probability = base.softmax(-1).gather(-1, ours[:, :1])[:, 0]
    same = (ours[:, :, None] == theirs[:, None, :]).float()
    # Summed over both ranks up to k: how many of the first k of one are among the first k of the other.
    common = same.cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2)
    overlap = common / torch.arange(1, k + 1, device=common.device)
    return js, first, probability, first == theirs[:, 0], overlap


def summarise(js: Tensor, probability: Tensor, overlap: Tensor) -> dict[str, float]:
    """The figures of the three panels.

    Args:
        js: [R], nats.
        probability: Of the trained policy's likeliest token under the base, [R].
        overlap: [R, k].
    """
    shifted = js > SHIFTED
    figures: dict[str, float] = {
        "positions": float(len(js)),
        "shifted": float(shifted.double().mean()),
        "js_mean": float(js.mean()),
        "js_max": float(js.max()),
    }
    if shifted.any():
        figures |= {f"overlap@{k + 1}": float(v) for k, v in enumerate(overlap[shifted].mean(0))}
        figures |= {f"base_below_{t:g}": float((probability[shifted] < t).double().mean()) for t in UNLIKELY}
    return figures


@dataclass
class Shift:
    """The instrument.

    Args:
        samples: Rollouts of each problem.
        base: What training began with: a module that has it as `model`.
    """

    samples: int
    base: nn.Module

    def __call__(
        self, module: RLRTModule, data: RolloutDataModule, benchmark: str, limit: int | None, out: Path
    ) -> list[Path]:
        """Draws rollouts of the trained policy and compares; returns the files written."""
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
        figures = summarise(js, probability, overlap)
        with (out / "shift_summary.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("figure", "value"), *figures.items()])

        titles = ["how far positions moved", "top-k overlap where moved", "how unlikely the new top-1 was"]
        figure, (first, second, third) = panels(titles)
        look = style(0)
        ranked = js.sort().values.clamp(min=1e-6)
        remaining = 1 - torch.arange(len(ranked)) / len(ranked)
        first.step(ranked, remaining, color=look.color, where="post", linewidth=1.3)
        first.axvline(SHIFTED, color="0.4", linewidth=0.8, linestyle=":")
        first.set_xscale("log")
        first.set_yscale("log")
        first.set_xlabel("JS(trained, base) (nats)")
        first.set_ylabel("share of positions above")
        if "overlap@1" in figures:
            ks = range(1, overlap.shape[1] + 1)
            second.plot(ks, [figures[f"overlap@{k}"] for k in ks], color=look.color, marker=look.marker, ms=3, lw=1.2)
            shares = [100 * figures[f"base_below_{t:g}"] for t in UNLIKELY]
            third.bar(range(len(UNLIKELY)), shares, color=look.color)
        second.set_xlabel(f"k   ({int((js > SHIFTED).sum())} positions with JS > {SHIFTED})")
        second.set_ylabel("shared tokens / k")
        second.set_ylim(0, 1.02)
        second.set_xticks([1, 5, 10, 15, 20])
        third.set_xticks(range(len(UNLIKELY)), [f"{t:g}" for t in UNLIKELY])
        third.set_xlabel("base probability below")
        third.set_ylabel("share of moved positions (%)")
        return [out / "shift.parquet", out / "shift_summary.csv", *save(figure, out, "shift")]
