"""A run overwrites no file that it did not write."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger

from rlrt_lightning import ConfigError
from rlrt_lightning.__main__ import main
from rlrt_lightning.analysis.plots import prepare_folder
from rlrt_lightning.callbacks import HFExport
from rlrt_lightning.evaluation.results import CURVES, Results, write_tables
from rlrt_lightning.runtime.run_files import claim_path, run_folder
from tests.helpers.command_line import SMALL, cli_exit_code
from tests.helpers.processes import ROOT

ARGS = [*SMALL, "--trainer.max_epochs=1", "--reversed_signal.picture_every_n_epochs=1"]

IDS = count()


class SharedFolderLogger(Logger):
    """Like wandb's logger: one save_dir for all runs, and an id for each.

    Args:
        save_dir: The folder of all runs.
    """

    def __init__(self, save_dir: str = ".") -> None:
        super().__init__()
        self._save_dir, self._id = save_dir, f"id{next(IDS)}"

    @property
    def name(self) -> str:
        return "project"

    @property
    def version(self) -> str:
        return self._id

    @property
    def save_dir(self) -> str:
        return self._save_dir

    def log_metrics(self, *_: Any, **__: Any) -> None: ...

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.logger=false"],
        pytest.param(["--trainer.logger=tests.runtime.test_run_files.SharedFolderLogger"], marks=pytest.mark.slow),
        pytest.param(
            ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=.", "--trainer.logger.name="],
            marks=pytest.mark.slow,
        ),
        ["--trainer.fast_dev_run=true"],
    ],
    ids=lambda flags: flags[0].split("=")[1],
)
def test_a_run_leaves_the_users_files_unchanged(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run starts in a folder with the user's config and other results."""
    monkeypatch.chdir(tmp_path)
    mine = {"config.yaml": (ROOT / "configs" / "rlrt.yaml").read_text()}
    mine |= dict.fromkeys(("evaluation/heldout.jsonl", "signal/epoch-1.html", "metrics.csv", "export/model"), "mine")
    for name, text in mine.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    for command_ in ("fit", "validate"):
        assert main([command_, "--config=config.yaml", *ARGS, "--trainer.callbacks+=HFExport", *flags]) == 0
    for name, text in mine.items():
        assert Path(name).read_text() == text, name
    if "fast" in flags[0]:
        assert not list(Path.cwd().rglob("*.ckpt"))
        assert len(list(Path.cwd().rglob("config.yaml"))) == 1
    else:
        assert len({path.parent for path in Path.cwd().rglob("config.yaml")}) == 3


@pytest.mark.parametrize(
    ("logger", "existing"),
    [("CSVLogger", "metrics.csv"), ("CSVLogger", "config.yaml"), ("TensorBoardLogger", "signal/epoch-1.html")],
)
@pytest.mark.filterwarnings("ignore:Experiment logs directory")  # Lightning warns, but the run is refused
def test_a_folder_with_files_of_another_run_is_refused(
    logger: str, existing: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine" / "v" / existing
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    place = [f"--trainer.logger={logger}", f"--trainer.logger.save_dir={tmp_path}", "--trainer.logger.name=mine"]
    assert main(["fit", *ARGS, *place, "--trainer.logger.version=v"]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "already exists and would be overwritten" in line
    assert file.read_text() == "mine"


def test_a_run_may_write_to_its_own_folder_again(tmp_path: Path) -> None:
    """As in `fit` and then `test` with one trainer, or with two that share a logger."""
    logger = CSVLogger(tmp_path, "mine", "v")
    for _ in range(2):
        trainer = Trainer(logger=logger)
        path = claim_path(trainer, "signal")
        path.mkdir(parents=True, exist_ok=True)
        (path / "file").touch()
    with pytest.raises(ConfigError, match="already exists"):
        claim_path(Trainer(logger=CSVLogger(tmp_path, "mine", "v")), "signal")


def test_runs_without_a_logger_get_separate_folders(tmp_path: Path) -> None:
    def folder(root: Path) -> Path:
        return run_folder(Trainer(logger=False, default_root_dir=root))

    assert folder(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "config.yaml").touch()
    assert [folder(tmp_path).name for _ in range(2)] == ["no_logger", "no_logger-2"]
    trainer = Trainer(logger=SharedFolderLogger(str(tmp_path)), enable_checkpointing=False)
    assert run_folder(trainer) == tmp_path / "project" / str(trainer.logger.version)


def test_an_export_into_an_existing_folder_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("mine")
    export = ["--trainer.callbacks+=HFExport", f"--trainer.callbacks.path={tmp_path / 'model'}"]
    assert cli_exit_code("fit", tmp_path, "--trainer.max_epochs=1", *export) == 2
    assert "HFExport.path: " in capfd.readouterr().err
    module: Any = SimpleNamespace(policy=SimpleNamespace(lora=None))
    trainer = Trainer(logger=False, default_root_dir=tmp_path)
    HFExport(str(tmp_path / "other")).setup(trainer, module, "fit")


@pytest.mark.parametrize("name", ["heldout.jsonl", "heldout-rank1.jsonl", "heldout.parquet", CURVES])
def test_evaluation_results_do_not_overwrite_data_files(name: str, tmp_path: Path) -> None:
    """Such as the data set itself, if evaluation.results names its folder."""
    (tmp_path / name).write_text('{"prompt": "a"}\n')
    with pytest.raises(ConfigError, match=rf"evaluation\.results: .*{name} already exists"):
        Results(tmp_path, "heldout").begin({"samples": 1})
    assert (tmp_path / name).read_text() == '{"prompt": "a"}\n'


def test_a_new_evaluation_set_keeps_the_curves_of_the_others(tmp_path: Path) -> None:
    row = {"problem": "p", "samples": 1, "correct": 1}
    for name in ("a", "b", "b"):
        Results(tmp_path, name).begin({"samples": 1, "weights": "w"})
        write_tables(tmp_path, {name: [row]})
    lines = (tmp_path / CURVES).read_text().splitlines()
    assert [line.split(",")[:3] for line in lines[1:]] == [["a", "1", "1.0"], ["b", "1", "1.0"]]


def test_plots_overwrite_no_existing_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "curves.csv").touch()
    assert main(["curves", f"a={tmp_path}", f"--out={tmp_path}"]) == 2
    err = capfd.readouterr().err
    assert "curves.csv already exists and would be overwritten; set --out to another folder" in err
    assert prepare_folder(tmp_path, "pass_at_k") == tmp_path
    (tmp_path / "shift_summary.csv").touch()
    with pytest.raises(ConfigError, match="shift_summary"):
        prepare_folder(tmp_path, "shift")
