"""Matrices of which CI tests a part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def in_part(values: Iterable[Any], *in_ci: Any) -> list[Any]:
    """All values for `parametrize`, where those that CI leaves out are marked as slow."""
    return [value if value in in_ci else pytest.param(value, marks=pytest.mark.slow) for value in values]
