"""Shared fixtures and settings of the tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from rlrt_lightning.__main__ import EXPECTED_WARNINGS

# Random examples are the same in every run; `--hypothesis-profile=random` searches for new ones.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("random", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("fixed")

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data sets beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the shared/ folder with data sets is not beside this checkout")
    return SHARED


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """Destroys the process group that a multi-rank strategy has left in this process. vLLM's groups live as long as
    the process."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None and "vllm" not in sys.modules and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def pytest_configure(config: pytest.Config) -> None:
    """Other warnings are errors (pyproject.toml); these are also expected in tests without a command line."""
    for message in EXPECTED_WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")
