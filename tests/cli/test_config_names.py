"""Shipped configs are named without their path."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlrt_lightning.cli.config_names import FOLDER, names, with_config_files
from rlrt_lightning.runtime.errors import ConfigError
from tests.helpers.processes import ROOT


def test_a_shipped_config_is_found_by_its_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = with_config_files(
        ["fit", "--config", "rlrt", "--config=methods/grpo", "--config=configs/models/smollm2.yaml"]
    )
    files = [FOLDER / name for name in ("rlrt.yaml", "methods/grpo.yaml", "models/smollm2.yaml")]
    assert words == ["fit", "--config", str(files[0]), f"--config={files[1]}", f"--config={files[2]}"]
    assert all(file.exists() for file in files)


def test_a_file_of_ones_own_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rlrt").write_text("trainer: {max_epochs: 1}")
    assert with_config_files(["fit", "--config=rlrt", "--data.task", "rlrt"]) == [
        "fit",
        "--config=rlrt",
        "--data.task",
        "rlrt",
    ]


def test_every_config_that_is_complete_or_can_be_added_has_a_name() -> None:
    sections = {"gsm8k/data", "paper/data", "paper/trainer"}
    found = {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in (ROOT / "configs").rglob("*.yaml")}
    assert set(names()) == found - sections


def test_an_unknown_name_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"did you mean recipes/gsm8k-qwen3-0\.6b\?"):
        with_config_files(["fit", "--config=recipes/gsm8k-qwen3-0.6"])
