"""A task on which exploration decides, with a tiny model that is warm-started on it: sums with a choice of strategy."""

from __future__ import annotations

from rlrt_lightning.tasks.strategy_sum.task import (
    CONTROL_SHARES,
    DIGITS,
    MARK,
    PLACES,
    SLIPS,
    STRATEGIES,
    TRAP_SHARES,
    StrategySum,
    draw_digits,
    is_heldout,
    question,
    solution,
)

__all__ = [
    "CONTROL_SHARES",
    "DIGITS",
    "MARK",
    "PLACES",
    "SLIPS",
    "STRATEGIES",
    "TRAP_SHARES",
    "StrategySum",
    "draw_digits",
    "is_heldout",
    "question",
    "solution",
]
