"""Sees a collapse where it shows first: in the entropy and the length of the rollouts."""

from __future__ import annotations

import logging
import math
from collections import deque
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, cast

from lightning import Callback, LightningModule, Trainer

from rlrt_lightning.runtime.errors import ConfigError

if TYPE_CHECKING:
    from rlrt_lightning.datamodule import RolloutDataModule

log = logging.getLogger(__name__)

ENTROPY_NOISE = 0.1
"""Nats below which entropy may rise as it likes: a policy that is nearly sure is far from running away."""

ADVICE = (
    "lower model.optimizer.lr, act on fewer rollouts (model.method.gated) or more weakly (model.method.lam, eps_w), "
    "and start again from a checkpoint before it"
)


class CollapseGuard(Callback):
    """Watches the rollouts for a policy that runs away, as in the paper's RLRT-all: moving means of entropy, length
    and the share of truncated rollouts are compared with those of the run's first epochs.

    Entropy that falls and responses that grow are what successful runs look like too. So entropy counts when it rises,
    and length and truncated rollouts when they come near what they can be at most: above their limit, and over half
    of the way from where they began to 1. Each curve is reported once.

    Args:
        action: warn, or stop: end after the epoch, which is saved as always. null watches nothing.
        window: Epochs of the moving mean, and of the reference at the beginning; nothing is said before both are full.
        entropy_rise: `rollout/entropy` above so many times its reference, and above 0.1 nats, is a collapse; null
            never.
        entropy_floor: `rollout/entropy` below so many nats is a collapse; null never: at the end of a run on an easy
            task it is near 0.
        length: `rollout/length` above this share of `data.sampling.max_new_tokens` is a collapse; null never.
        truncated: `rollout/truncated` above this share is a collapse; null never.
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
        """Adds the epoch to the curves, before it is saved."""
        if self.action is None:
            return
        data = cast("RolloutDataModule", cast(Any, trainer).datamodule)
        metrics, most = data.rollout_metrics, data.sampling.max_new_tokens
        for tag, unit in (("rollout/entropy", 1.0), ("rollout/length", most), ("rollout/truncated", 1.0)):
            if tag not in metrics:  # an engine that gives no entropies
                continue
            moved = self._curves.setdefault(tag, Curve(self.window)).add(metrics[tag] / unit)
            if moved is None or tag in self._reported or not self.collapsed(tag, *moved):
                continue
            self._reported.append(tag)
            said = f"{tag} has gone from {moved[0] * unit:.3g} to {moved[1] * unit:.3g} (means of {self.window} epochs)"
            if self.action == "stop":
                trainer.should_stop = True
                ending = f"stopped after epoch {trainer.current_epoch}; {ADVICE}, or go on with --ckpt_path last"
            else:
                ending = ADVICE
            if trainer.is_global_zero:
                log.warning("the policy may be collapsing: %s; %s", said, ending)

    def collapsed(self, tag: str, reference: float, now: float) -> bool:
        """Whether a curve has run away.

        Args:
            tag: Which one.
            reference: Its mean at the beginning; of the length, as a share of what it can be.
            now: Its moving mean.
        """
        if tag == "rollout/entropy":
            rise, floor = self.entropy_rise, self.entropy_floor
            risen = rise is not None and now > max(rise * reference, ENTROPY_NOISE)
            return risen or (floor is not None and now < floor)
        limit = self.length if tag == "rollout/length" else self.truncated
        return limit is not None and now > max(limit, (1 + reference) / 2)

    def state_dict(self) -> dict[str, Any]:
        """The curves as far as they are needed, so that a resumed run compares with its beginning."""
        curves = {tag: (list(curve.first), list(curve.last)) for tag, curve in self._curves.items()}
        return {"curves": curves, "reported": self._reported}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self._curves = {tag: Curve(self.window, *parts) for tag, parts in state_dict["curves"].items()}
        self._reported = list(state_dict["reported"])


class Curve:
    """The mean of a curve's beginning, and its moving mean.

    Args:
        window: How many values each is the mean of.
        first: The beginning, as far as it is known.
        last: The newest values after it.
    """

    def __init__(self, window: int, first: list[float] | None = None, last: list[float] | None = None) -> None:
        self.window = window
        self.first = (first or [])[:window]
        self.last = deque(last or [], maxlen=window)

    def add(self, value: float) -> tuple[float, float] | None:
        """Both means after one more value; None while there are too few."""
        if len(self.first) < self.window:
            self.first.append(value)
        else:
            self.last.append(value)
        return (fmean(self.first), fmean(self.last)) if len(self.last) == self.window else None
