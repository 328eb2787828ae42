"""The command line in this process, and what its runs leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlrt_lightning.__main__ import main
from rlrt_lightning.analysis import events
from rlrt_lightning.cli.commands import RLRTCli
from tests.helpers.processes import ROOT

SMALL = [
    "--data.benchmarks.heldout.limit=6",
    "--data.benchmarks.longer.limit=3",
    "--data.prompts_per_epoch=8",
    "--trainer.enable_progress_bar=false",
    "--trainer.check_val_every_n_epoch=2",
]


def command(name: str, folder: Path, *flags: str, configs: tuple[str, ...] = ()) -> int:
    files = ["configs/rlrt.yaml", *configs]
    words = [f"--config={ROOT / file}" for file in files]
    return main([name, *words, *SMALL, f"--trainer.logger.save_dir={folder}", *flags])


def scalars(folder: Path, version: int = 0) -> dict[str, list[tuple[int, float]]]:
    """Every curve of a run, as steps and values."""
    return events.scalars(folder / "rlrt" / f"version_{version}")


def comparable(curves: dict[str, Any]) -> dict[str, Any]:
    return {tag: curve for tag, curve in curves.items() if not tag.startswith(("time/", "speed/")) and tag != "epoch"}


def weights(folder: Path, version: int = 0) -> dict[str, torch.Tensor]:
    path = folder / "rlrt" / f"version_{version}" / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


def union(folder: Path) -> dict[str, dict[int, float]]:
    """Every curve over all runs in a folder; where two have the same step they have to agree."""
    curves: dict[str, dict[int, float]] = {}
    for version in range(len(list((folder / "rlrt").iterdir()))):
        for tag, curve in comparable(scalars(folder, version)).items():
            for step, value in curve:
                assert curves.setdefault(tag, {}).setdefault(step, value) == value, (tag, step)
    return curves


class Settings(RLRTCli):
    """Stops once the settings are known."""

    def instantiate_classes(self) -> None: ...

    def after_instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...
