"""Marks for parametrized tests of which CI runs a part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(values: Iterable[Any], *in_ci: Any) -> list[Any]:
    """All values for `parametrize`, tuples for several arguments; those not in `in_ci` are marked as slow."""
    cases = ((value, value if isinstance(value, tuple) else (value,)) for value in values)
    return [value if value in in_ci else pytest.param(*case, marks=pytest.mark.slow) for value, case in cases]
