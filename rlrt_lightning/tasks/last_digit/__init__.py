"""A task on which exploration decides, and a tiny model that is warm-started on it: sums, and three ways to do them."""

from __future__ import annotations

from rlrt_lightning.tasks.last_digit.task import (
    CONTROL_SHARES,
    FEWEST,
    ITEMS,
    MOST,
    SLIPS,
    TEACHER_TEMPLATE,
    TRAP_SHARES,
    WAYS,
    LastDigit,
    draw_digits,
    is_heldout,
    question,
    solution,
)

__all__ = [
    "CONTROL_SHARES",
    "FEWEST",
    "ITEMS",
    "MOST",
    "SLIPS",
    "TEACHER_TEMPLATE",
    "TRAP_SHARES",
    "WAYS",
    "LastDigit",
    "draw_digits",
    "is_heldout",
    "question",
    "solution",
]
