"""Runs the command line in this process, and reads what its runs have written."""

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

TRAIN_ONLY = ["--trainer.num_sanity_val_steps=0", "--trainer.limit_val_batches=0"]
"""For a run whose evaluations are not tested."""


def cli_exit_code(name: str, folder: Path, *flags: str, configs: tuple[str, ...] = ()) -> int:
    """Runs a subcommand with configs/rlrt.yaml, further configs and flags, and returns its exit code."""
    files = ["configs/rlrt.yaml", *configs]
    args = [f"--config={ROOT / file}" for file in files]
    return main([name, *args, *SMALL, f"--trainer.logger.save_dir={folder}", *flags])


def scalars(folder: Path, version: int = 0) -> dict[str, list[tuple[int, float]]]:
    """Every logged metric of a run, as pairs of step and value."""
    return events.scalars(folder / "rlrt" / f"version_{version}")


def without_timings(curves: dict[str, Any]) -> dict[str, Any]:
    """The curves without times and speeds: two equal runs agree in all of them."""
    return {tag: curve for tag, curve in curves.items() if not tag.startswith(("time/", "speed/")) and tag != "epoch"}


def weights(folder: Path, version: int = 0) -> dict[str, torch.Tensor]:
    """The state dict of a run's last checkpoint."""
    path = folder / "rlrt" / f"version_{version}" / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


def merged_curves(folder: Path) -> dict[str, dict[int, float]]:
    """The curves of all runs in a folder as one; runs that share a step must agree on its value. A step may have two
    values of a run, one from the evaluation before training and one from an evaluation within the first epoch; the
    second one counts."""
    curves: dict[str, dict[int, float]] = {}
    for version in range(len(list((folder / "rlrt").iterdir()))):
        for tag, curve in without_timings(scalars(folder, version)).items():
            for step, value in dict(curve).items():
                assert curves.setdefault(tag, {}).setdefault(step, value) == value, (tag, step)
    return curves


def assert_continued(cut: Path, whole: Path, version: int = 1) -> None:
    """The runs in `cut`, the last of which is `version`, equal the uninterrupted run in `whole` bit for bit."""
    assert merged_curves(cut) == merged_curves(whole)
    final = weights(cut, version=version)
    for name, value in weights(whole).items():
        assert torch.equal(value, final[name]), name


class ParsingCli(RLRTCli):
    """Parses the settings and runs nothing."""

    def instantiate_classes(self) -> None: ...

    def after_instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...
