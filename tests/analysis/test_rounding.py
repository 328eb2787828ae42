"""benchmarks/rounding.py: runs of the real command with the embedded model, and their table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import paired_runs, rounding
from tests.helpers.tiny import half_checkpoint

EMBEDDED = [
    "--config=configs/rlrt.yaml",
    "--config=configs/methods/grpo.yaml",
    "--model.optimizer.lr=1e-6",
    "--data.benchmarks.longer.limit=2",
    "--data.benchmarks.heldout.limit=2",
]


@pytest.mark.slow
def test_the_table_tells_what_arrives_in_the_rounded_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = half_checkpoint(tmp_path / "model")
    real, started = rounding.flags, []

    def flags(*run: Any) -> list[str]:
        started.append(run)
        return [*EMBEDDED, *(flag for flag in real(*run) if not flag.startswith("--config"))]

    monkeypatch.setattr(rounding, "flags", flags)
    runs = [(setting, 0, tmp_path / f"{i}") for i, setting in enumerate(rounding.SETTINGS)]
    for run in [*runs, *runs]:
        rounding.train(*run, Path(model), 2, 1)
    assert len(started) == 3
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in rounding.table(runs, 2).splitlines()[2:]]
    assert [row[:2] for row in rows] == [[setting, end] for setting in rounding.SETTINGS for end in "012"]
    plain, dithered, exact = ([float(rows[i + 2][column]) for column in (2, 3)] for i in (0, 3, 6))
    assert plain[0] < 0.1
    assert plain[1] < 0.2
    assert dithered[1] == pytest.approx(1, abs=0.15)
    assert exact == [pytest.approx(1, abs=0.1), 1]


def test_the_settings_of_each_run_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers.command_line import ParsingCli

    monkeypatch.syspath_prepend(str(paired_runs.ROOT / "benchmarks"))
    for setting in rounding.SETTINGS:
        settings: Any = ParsingCli(["fit", *rounding.flags(setting, 3, tmp_path, Path("embedded"), 7)]).config.fit
        assert settings.trainer.precision == ("32-true" if setting == "float32" else "bf16-mixed")
        assert settings.model.policy.dither == (setting != "bf16-mixed, without dither")
        assert settings.trainer.max_epochs == settings.trainer.check_val_every_n_epoch == 7
