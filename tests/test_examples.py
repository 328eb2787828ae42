"""The scripts and the notebook in examples/ run as they are, or with fewer epochs."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from examples import custom_reward, train
from examples.custom_method import FirstTokens
from rlrt_lightning import GRPO, RLRT
from rlrt_lightning.__main__ import main
from tests.helpers.command_line import ParsingCli
from tests.helpers.processes import ROOT

EXAMPLES = ROOT / "examples"


def test_train_prints_an_answer_to_the_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train.main(max_epochs=1)
    assert "tea 4 milk 5 eggs 7 rice 0, last digit of the total?" in capsys.readouterr().out.splitlines()[-1]


def test_custom_reward_trains_with_its_own_data_and_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    custom_reward.main(max_epochs=1)
    assert re.search(r"^epoch 1/1 .* reward 0\.\d", capsys.readouterr().out, flags=re.MULTILINE)


def test_custom_method_is_rlrt_on_the_first_tokens_and_grpo_on_the_others() -> None:
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    advantages, rewards = torch.tensor([1.0, -1.0, 0.5, -0.5]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    values = (advantages, rewards, -rows.abs(), -rows.flip(0).abs(), torch.ones(4, 6).bool(), torch.ones(4).bool())
    own, rlrt, grpo = FirstTokens(tokens=2)(*values), RLRT()(*values), GRPO()(*values)
    assert torch.equal(own.advantages[:, :2], rlrt.advantages[:, :2])
    assert torch.equal(own.advantages[:, 2:], grpo.advantages[:, 2:])
    assert not torch.equal(rlrt.advantages[:, 2:], grpo.advantages[:, 2:])


def command_in(name: str) -> list[str]:
    """The arguments of the command in a script's docstring."""
    text = (EXAMPLES / name).read_text(encoding="utf-8").split('"""')[1].replace("\\\n", " ")
    (command,) = re.findall(r"^python -m rlrt_lightning (.+)$", text, flags=re.MULTILINE)
    return command.split()


def test_the_command_of_custom_method_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    ParsingCli(command_in("custom_method.py"))


def test_the_command_of_custom_reward_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for seed, name in enumerate(("totals.jsonl", "heldout.jsonl")):
        custom_reward.write_totals(tmp_path / name, rows=20, seed=seed)
    few = ["--data.prompts_per_epoch=4", "--data.benchmarks={heldout: {samples: 1, limit: 4}}"]
    assert main([*command_in("custom_reward.py"), "--trainer.max_epochs=1", *few]) == 0
    assert re.search(r"^epoch 1/1 .* reward \d", capsys.readouterr().out, flags=re.MULTILINE)


def test_the_notebook_runs_in_a_kernel_with_its_reward_in_a_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    assert [output.output_type for output in outputs if "image/png" in output.get("data", ())] == ["execute_result"] * 3
    assert "last digit of the total?<assistant>" in printed, "an answer"
    rewards = re.findall(r"^epoch \d+/4 .*reward (\S+)  correct (\S+)", printed, flags=re.MULTILINE)
    # The reward in the cell halves that of long answers; a reward that fails counts as wrong.
    assert any(0 < float(reward) < float(correct) for reward, correct in rewards)


def test_the_saved_notebook_has_no_outputs() -> None:
    cells = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
