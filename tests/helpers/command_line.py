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


def runs_in(folder: Path) -> list[Path]:
    """The folders of the runs in a logger's folder, `<task>/<name>`, in the order in which they were started."""
    found: dict[Path, tuple[int, ...]] = {}
    for events_ in folder.glob("*/*/events.out.tfevents.*"):
        seconds, *_, number = events_.name.removeprefix("events.out.tfevents.").split(".")
        start = int(seconds), int(number)
        found[events_.parent] = min(start, found.get(events_.parent, start))
    return sorted(found, key=found.__getitem__)


def scalars(folder: Path, number: int = 0) -> dict[str, list[tuple[int, float]]]:
    """Every logged metric of a run, as pairs of step and value. A resumed run continues in its folder."""
    return events.scalars(runs_in(folder)[number])


def evaluation_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The metrics of the newest evaluation in a logger's folder."""
    found = folder.glob("**/evaluation*/**/events.out.tfevents.*")
    return events.scalars(max(found, key=lambda path: path.stat().st_mtime_ns).parent)


def without_timings(curves: dict[str, Any]) -> dict[str, Any]:
    """The curves without times and speeds: two equal runs agree in all of them."""
    return {tag: curve for tag, curve in curves.items() if not tag.startswith(("time/", "speed/"))}


def weights(folder: Path, number: int = 0) -> dict[str, torch.Tensor]:
    """The state dict of a run's last checkpoint."""
    return torch.load(runs_in(folder)[number] / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def merged_curves(folder: Path) -> dict[str, dict[int, float]]:
    """The curves of all processes of a run as one; those that share a step must agree on its value. A process may log
    two values for a step, one from the evaluation before training and one from an evaluation within the first epoch;
    the second one counts."""
    curves: dict[str, dict[int, float]] = {}
    (run,) = runs_in(folder)
    for path in sorted(run.glob("events.out.tfevents.*")):
        for tag, curve in without_timings(events.scalars(path)).items():
            for step, value in dict(curve).items():
                assert curves.setdefault(tag, {}).setdefault(step, value) == value, (tag, step)
    return curves


def assert_continued(cut: Path, whole: Path) -> None:
    """The interrupted run in `cut` equals the whole run in `whole` bit for bit."""
    assert merged_curves(cut) == merged_curves(whole)
    final = weights(cut)
    for name, value in weights(whole).items():
        assert torch.equal(value, final[name]), name


class ParsingCli(RLRTCli):
    """Parses the settings, and runs and creates nothing."""

    def before_instantiate_classes(self) -> None:
        self.config[self.subcommand].ckpt_path = self._ckpt_path

    def instantiate_classes(self) -> None: ...

    def after_instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...
