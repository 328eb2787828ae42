"""The model card of an exported policy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from rlrt_lightning import RLRT, SDPO, DatasetTask, ExactMatch
from rlrt_lightning.callbacks import HFExport
from rlrt_lightning.objective import Method
from tests.helpers.epochs import fit_and_record


@dataclass(frozen=True)
class Own(RLRT):
    """A method of one's own."""


@pytest.mark.parametrize(("method", "paper"), [(Own(lam=0.25), "2605.10781"), (SDPO(), "2601.20802")])
def test_a_card_states_data_method_and_settings_without_local_paths(method: Method, paper: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"tea {i} milk 2 eggs 3", "answer": str((i + 5) % 10)} for i in range(8)]
    (tmp_path / "private").mkdir()
    data = tmp_path / "private" / "totals.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = DatasetTask(str(data), answer="answer", reward=ExactMatch())
    fit_and_record(tmp_path, task, epochs=2, method=method, callbacks=[HFExport(str(tmp_path / "export"))])
    card = ModelCard.load(tmp_path / "export" / "README.md")
    name = type(method).__name__
    assert card.data.tags[-1] == name.lower()
    assert f"2 epochs (4 optimizer steps) of [{name}](https://arxiv.org/abs/{paper}) on totals.jsonl" in card.text
    assert "data.prompts_per_epoch: 4" in card.text
    assert "The policy was not evaluated" in card.text
    assert str(tmp_path) not in card.content
