"""Detects a collapse of the policy from the entropy and length of its rollouts."""

from __future__ import annotations

import logging
import math
from collections import deque
from statistics import fmean
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer

from rlrt_lightning.runtime.errors import ConfigError

from .parts import data_of

log = logging.getLogger(__name__)

MIN_ENTROPY = 0.1
"""Rises of entropy up to this value, in nats, are ignored: a nearly deterministic policy is far from a collapse."""

ADVICE = (
    "lower model.optimizer.lr, reweight fewer rollouts (model.method.gated) or weaken the reweighting "
    "(model.method.lam, eps_w), and restart from an earlier checkpoint"
)


class CollapseGuard(Callback):
    """Detects a collapsing policy, as in the paper's RLRT-all. Compares moving means of entropy, length and the share
    of truncated rollouts with their means over the run's first epochs.

    Entropy also falls and responses also grow in successful runs. Entropy is therefore reported when it rises, length
    and truncation when they exceed their limit and more than half of the distance from their reference to 1. Each
    metric is reported once.

    Args:
        action: `warn`; `stop`, which also ends the run after the epoch, saved as usual; or null to disable the checks.
        window: Epochs in the moving mean, and in the reference at the start; the checks begin when both are complete.
        entropy_rise: `rollout/entropy` above this multiple of its reference, and above 0.1 nats, is a collapse. Null
            disables this check.
        entropy_floor: `rollout/entropy` below this value, in nats, is a collapse. Null disables this check: on easy
            tasks entropy ends near 0.
        length: `rollout/length` above this share of `data.sampling.max_new_tokens` is a collapse. Null disables this
            check.
        truncated: `rollout/truncated` above this share is a collapse. Null disables this check.
    """

    def __init__(
        self,
        action: Literal["warn", "stop"] | None = "warn",
        window: int = 10,
        entropy_rise: float | None = 2.0,
        entropy_floor: float | None = None,
        length: float | None = 0.8,
        truncated: float | None = 0.5,
    ) -> None:
        if window < 1:
            raise ConfigError(f"collapse_guard.window is {window}; it has to be at least 1")
        if entropy_rise is not None and not 1 < entropy_rise < math.inf:
            raise ConfigError(f"collapse_guard.entropy_rise is {entropy_rise}; it has to be above 1, or null")
        if entropy_floor is not None and not 0 < entropy_floor < math.inf:
            raise ConfigError(f"collapse_guard.entropy_floor is {entropy_floor}; it has to be above 0, or null")
        for name, share in (("length", length), ("truncated", truncated)):
            if share is not None and not 0 < share < 1:
                raise ConfigError(f"collapse_guard.{name} is {share}; it has to be between 0 and 1, or null")
        self.action = action
        self.window = window
        self.entropy_rise, self.entropy_floor = entropy_rise, entropy_floor
        self.length, self.truncated = length, truncated
        self._curves: dict[str, Curve] = {}
        self._reported: list[str] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the epoch's metrics to the curves and checks them, before the epoch is saved."""
        if self.action is None:
            return
        data = data_of(trainer)
        metrics, longest = data.rollout_metrics, data.sampling.max_new_tokens
        for tag, unit in (("rollout/entropy", 1.0), ("rollout/length", longest), ("rollout/truncated", 1.0)):
            if tag not in metrics:  # no entropy without a finite log-prob
                continue
            means = self._curves.setdefault(tag, Curve(self.window)).add(metrics[tag] / unit)
            if means is None or tag in self._reported or not self.collapsed(tag, *means):
                continue
            self._reported.append(tag)
            reference, current = (mean * unit for mean in means)
            change = f"{tag} has gone from {reference:.3g} to {current:.3g} (means of {self.window} epochs)"
            if self.action == "stop":
                trainer.should_stop = True
                advice = f"stopped after epoch {trainer.current_epoch + 1}; {ADVICE}, or resume with --ckpt_path last"
            else:
                advice = ADVICE
            if trainer.is_global_zero:
                log.warning("the policy may be collapsing: %s; %s", change, advice)

    def collapsed(self, tag: str, reference: float, current: float) -> bool:
        """Whether a metric indicates a collapse.

        Args:
            tag: Name of the metric.
            reference: Its mean over the first epochs; for the length, as a share of the maximum.
            current: Its moving mean, in the same unit.
        """
        if tag == "rollout/entropy":
            rise, floor = self.entropy_rise, self.entropy_floor
            risen = rise is not None and current > max(rise * reference, MIN_ENTROPY)
            return risen or (floor is not None and current < floor)
        limit = self.length if tag == "rollout/length" else self.truncated
        return limit is not None and current > max(limit, (1 + reference) / 2)

    def state_dict(self) -> dict[str, Any]:
        """The references and current windows, so a resumed run keeps its reference."""
        curves = {tag: (list(curve.first), list(curve.last)) for tag, curve in self._curves.items()}
        return {"curves": curves, "reported": self._reported}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._curves = {tag: Curve(self.window, *parts) for tag, parts in state_dict["curves"].items()}
        self._reported = list(state_dict["reported"])


class Curve:
    """The mean of a metric's first values and the moving mean of its latest values.

    Args:
        window: Number of values in each mean.
        first: The first values so far, at most `window`.
        last: The latest values after them, at most `window`.
    """

    def __init__(self, window: int, first: list[float] | None = None, last: list[float] | None = None) -> None:
        self.window = window
        self.first = (first or [])[:window]
        self.last = deque(last or [], maxlen=window)

    def add(self, value: float) -> tuple[float, float] | None:
        """Adds a value and returns both means, or None until both windows are full."""
        if len(self.first) < self.window:
            self.first.append(value)
        else:
            self.last.append(value)
        return (fmean(self.first), fmean(self.last)) if len(self.last) == self.window else None
