"""The number of micro-batches per optimizer step if `data.tokens_per_pass` sets it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from rlrt_lightning.epoch.batch import Batches
from rlrt_lightning.runtime.errors import ConfigError


class Passes:
    """Sets the trainer's number of micro-batches per optimizer step to that of each epoch.

    Args:
        limit: `data.tokens_per_pass`; None leaves the trainer's number as it is.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._warned = False

    def check(self, trainer: Any) -> None:
        """Checks the trainer before its first epoch.

        Raises:
            ConfigError: If a setting of the trainer depends on the number of micro-batches.
        """
        if self.limit is None:
            return
        for name, default in (("accumulate_grad_batches", 1), ("val_check_interval", 1.0)):
            if (value := getattr(trainer, name)) != default:
                raise ConfigError(
                    f"trainer.{name} is {value}, but data.tokens_per_pass sets the number of micro-batches anew each "
                    "epoch; remove one of them"
                )

    def begin(self, trainer: Any, batches: Batches[Any]) -> None:
        """Sets the number for an epoch. Lightning reads it at each batch. Warns of the first rollout above the limit.

        Args:
            trainer: The trainer.
            batches: The epoch's micro-batches.
        """
        if self.limit is None:
            return
        trainer.accumulate_grad_batches = batches.accumulate
        if batches.longest > self.limit and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"a rollout has {batches.longest} tokens (prompt and response), more than data.tokens_per_pass "
                f"({self.limit}); such rollouts have passes of their own"
            )

    def end(self, trainer: Any) -> None:
        """Restores the number that `check` accepts, so that the trainer can fit again."""
        if self.limit is not None:
            trainer.accumulate_grad_batches = 1

    def resumed(self, trainer: Any, saved: int) -> int:
        """The number for the rest of an epoch that was interrupted.

        Args:
            trainer: The trainer.
            saved: The number in the checkpoint.
        """
        return saved if self.limit is not None else int(trainer.accumulate_grad_batches)
