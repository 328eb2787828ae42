"""Marks for parametrized tests of which CI runs a part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(values: Iterable[Any], *in_ci: Any) -> list[Any]:
    """All values for `parametrize`; those that are not in `in_ci` are marked as slow."""
    return [value if value in in_ci else pytest.param(value, marks=pytest.mark.slow) for value in values]
