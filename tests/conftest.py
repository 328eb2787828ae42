"""What the tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data sets and golden vectors beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the shared/ folder with data sets and golden vectors is not beside this checkout")
    return SHARED
