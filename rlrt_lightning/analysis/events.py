"""Reads the TensorBoard events of runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlrt_lightning.runtime.tensorboard import logged_tag

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def event_log(run: Path, *kinds: str) -> EventAccumulator:
    """The events of a run.

    Args:
        run: Folder with the run's events.
        kinds: Kinds of events to read in full (scalars, images, histograms, tensors); other kinds are sampled.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run), size_guidance=dict.fromkeys(kinds, 0)).Reload()


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every metric of a run, by the tag under which it was logged.

    Args:
        run: Folder with the run's events.
    """
    log = event_log(run, "scalars")
    return {logged_tag(tag): [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
