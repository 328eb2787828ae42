"""Shared fixtures and settings of the tests."""

from __future__ import annotations

import os
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

# Set before torch is imported: the models are too small for several threads, which would compete between processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

RANK_VARIABLES = ["MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"]
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data sets beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the shared/ folder with data sets is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs the tests in a temporary folder, so that none of them writes to the checkout."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("current"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """Cleans up after a multi-rank strategy that ran in this process.

    Lightning's launcher sets the variables even for a single rank. A run of two ranks that inherits them would wait
    forever for a second rank that another process should start. vLLM's groups live as long as the process.
    """
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    torch = sys.modules.get("torch")
    if torch is not None and "vllm" not in sys.modules and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def pytest_configure(config: pytest.Config) -> None:
    """Other warnings are errors (pyproject.toml); these are also expected in tests without a command line."""
    for message in EXPECTED_WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


@pytest.fixture
def in_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs in a program that is a file, also in the worker processes of xdist."""
    from rlrt_lightning.tasks import sending

    monkeypatch.setattr(sending, "_main_is_a_file", lambda: True)
