"""`Trainer(...).fit(module, datamodule)` and its relatives, called from Python: as from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from rlrt_lightning import (
    RLRT,
    RLSD,
    SDPO,
    Benchmark,
    ConfigError,
    Policy,
    RLRTModule,
    RolloutDataModule,
    Sampling,
    StrategySum,
    Teacher,
)
from rlrt_lightning.callbacks import Evaluation, ReversedSignalLogger, TeacherRefresh
from rlrt_lightning.runtime.run_files import run_folder
from tests.helpers.command_line import command, comparable, scalars, weights

OURS = ["EpochMetrics", "SafeStop", "PromptPreview", "TeacherRefresh", "ReversedSignalLogger", "Evaluation"]
OURS += ["RankGuard", "NumberGuard", "CollapseGuard", "RunCheckpoint"]


def module() -> RLRTModule:
    """As configs/rlrt.yaml has it."""
    adamw = lambda params: torch.optim.AdamW(params, lr=2e-4, weight_decay=0.0)  # noqa: E731
    return RLRTModule(Policy(), Teacher("{prompt}<sol>{context}"), optimizer=adamw, warmup_steps=0)


def data(**settings: Any) -> RolloutDataModule:
    """As configs/rlrt.yaml and tests/test_fit.py have it."""
    longer = Benchmark(task=StrategySum(digits=(7, 8)), limit=3)
    benchmarks = {"heldout": Benchmark(limit=6), "longer": longer}
    given = {"sampling": Sampling(max_new_tokens=30), "prompts_per_epoch": 8, "benchmarks": benchmarks, **settings}
    return RolloutDataModule(**given)


def trainer(folder: Path, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    as_there = {"max_epochs": 2, "check_val_every_n_epoch": 2, "gradient_clip_val": 1.0, "default_root_dir": folder}
    if not settings.get("barebones"):
        as_there["logger"] = TensorBoardLogger(folder, "rlrt")
    return Trainer(**{**quiet, **as_there, **settings})


def ours(of: Trainer) -> list[str]:
    return [type(callback).__name__ for callback in of.callbacks if type(callback).__name__ in OURS]


def files(folder: Path) -> set[str]:
    """What is in a folder, but the configuration that the command line alone knows."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if "events.out" not in name and name != "config.yaml"}


@pytest.fixture(scope="module")
def by_command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four epochs from the command line."""
    folder = tmp_path_factory.mktemp("command")
    assert command("fit", folder, "--trainer.max_epochs=4") == 0
    return folder


def same_run(folder: Path, by_command: Path, since: int = 0) -> None:
    expected, found = comparable(scalars(by_command)), comparable(scalars(folder))
    assert found.keys() == expected.keys() or since
    for tag, curve in found.items():
        assert curve == [(step, value) for step, value in expected[tag] if step >= since], tag
    for name, value in weights(by_command).items():
        assert torch.equal(value, weights(folder)[name]), name


def test_a_fit_from_python_is_that_of_the_command_line(by_command: Path, tmp_path: Path) -> None:
    fitted = trainer(tmp_path, max_epochs=4)
    fitted.fit(module(), data())
    same_run(tmp_path, by_command)
    assert ours(fitted) == OURS
    assert files(tmp_path / "rlrt" / "version_0") == files(by_command / "rlrt" / "version_0")


def test_a_run_of_the_command_line_is_resumed_from_python(by_command: Path, tmp_path: Path) -> None:
    """And the other way round, by way of its figures."""
    assert command("fit", tmp_path / "first", "--trainer.max_epochs=2") == 0
    (last,) = tmp_path.glob("first/rlrt/version_0/checkpoints/last.ckpt")
    resumed = trainer(tmp_path, max_epochs=4)
    resumed.fit(module(), data(), ckpt_path=last)
    same_run(tmp_path, by_command, since=4)
    assert comparable(scalars(tmp_path))["eval/heldout/avg@8"][0][0] == 7, "not measured again before training"


@pytest.mark.parametrize("name", ["validate", "test", "predict"])
def test_evaluations_from_python_are_those_of_the_command_line(name: str, by_command: Path, tmp_path: Path) -> None:
    (last,) = by_command.glob("rlrt/version_0/checkpoints/last.ckpt")
    assert command(name, tmp_path / "command", f"--ckpt_path={last}") == 0
    found = getattr(trainer(tmp_path), name)(module(), datamodule=data(), ckpt_path=last)
    there, here = (folder / "rlrt" / "version_0" for folder in (tmp_path / "command", tmp_path))
    assert files(there) == files(here)
    for file in ("heldout.jsonl", "longer.jsonl", "heldout.json", "pass_at_k.csv"):
        assert (there / "evaluation" / file).read_bytes() == (here / "evaluation" / file).read_bytes()
    if name != "predict":
        assert found[0]["eval/heldout/avg@8"] == dict(scalars(by_command)["eval/heldout/avg@8"])[7]


def test_an_evaluation_of_the_bare_minimum_has_figures(tmp_path: Path) -> None:
    """Nothing but a trainer, as in the documentation."""
    made = Trainer(logger=False, default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False)
    figures = made.validate(module(), datamodule=data())
    assert {"eval/heldout/avg@8", "eval/longer/pass@8"} <= figures[0].keys()
    assert (run_folder(made) / "evaluation" / "pass_at_k.csv").exists()


# -- whose callbacks -----------------------------------------------------------------------------------------------


class MySignals(ReversedSignalLogger):
    """A user's own."""


def test_the_users_callbacks_take_the_place_of_ours(tmp_path: Path) -> None:
    own = [MySignals(picture_every_n_epochs=0), Evaluation(ks=[1], table=0), TeacherRefresh(2, 0.5)]
    model, made = module(), trainer(tmp_path, callbacks=list(own), max_epochs=1, check_val_every_n_epoch=1)
    made.fit(model, data())
    assert all(callback in made.callbacks for callback in own)
    assert sorted(ours(made)) == sorted(set(OURS) - {"ReversedSignalLogger"})
    assert model.teacher.weights == "own"
    assert "eval/heldout/pass@1" in scalars(tmp_path)
    assert "eval/heldout/pass@8" not in scalars(tmp_path)
    assert not (run_folder(made) / "signal").exists()


@pytest.mark.parametrize("method", ["fit", "validate"])
def test_lightnings_own_checkpoints_get_our_settings_and_the_users_keep_theirs(method: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, max_epochs=1)
    asked_for_early = made.checkpoint_callback
    made.fit(module(), data())
    assert isinstance(asked_for_early, ModelCheckpoint)
    assert Path(asked_for_early.best_model_path).name == "epoch-0.ckpt"
    assert Path(asked_for_early.last_model_path).name == "last.ckpt"

    own = ModelCheckpoint(tmp_path / "own", save_top_k=-1, save_on_train_epoch_end=True)
    made = trainer(tmp_path, max_epochs=1, callbacks=[own])
    getattr(made, method)(module(), datamodule=data())
    assert made.checkpoint_callbacks == [own]
    names = [path.name for path in (tmp_path / "own").glob("*")]
    assert names == (["epoch=0-step=2.ckpt"] if method == "fit" else [])


def test_without_checkpoints_there_are_none(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    made.fit(module(), data())
    assert ours(made) == OURS[:-1]
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"barebones": True}], ids=str)
@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_trials_run_too(settings: dict[str, Any], tmp_path: Path) -> None:
    made = trainer(tmp_path, max_epochs=1, **settings)
    made.fit(module(), data())
    assert made.global_step > 0
    assert set(OURS[:-1]) <= set(ours(made))
    made.validate(made.lightning_module, datamodule=data())


# -- again ---------------------------------------------------------------------------------------------------------


def test_one_data_module_gives_each_run_the_same_rollouts(by_command: Path, tmp_path: Path) -> None:
    """As in a notebook that compares two methods."""
    both = data()
    trainer(tmp_path / "first", max_epochs=1).fit(module(), both)
    trainer(tmp_path / "second", max_epochs=4).fit(module(), both)
    same_run(tmp_path / "second", by_command)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # the trainer's own
def test_a_trained_module_is_evaluated_and_trained_on(by_command: Path, tmp_path: Path) -> None:
    model, made = module(), trainer(tmp_path, max_epochs=2)
    made.fit(model, data())
    before = made.validate(model, datamodule=data())
    assert made.test(model, datamodule=data()) == before
    assert ours(made) == OURS, "each of them once"
    made.fit_loop.max_epochs = 4
    made.fit(model, made.datamodule)
    assert made.current_epoch == 4
    again = trainer(tmp_path, max_epochs=1)
    again.fit(model, data())
    assert ours(again) == OURS
    assert not set(map(id, again.callbacks)) & set(map(id, made.callbacks))


def test_the_teacher_is_the_methods_unless_the_users_callback_says_otherwise(tmp_path: Path) -> None:
    for method, callbacks, expected in (
        (SDPO(), [], "own"),
        (RLSD(), [], "initial"),
        (RLSD(), [TeacherRefresh()], "initial"),
        (RLSD(), [TeacherRefresh(1)], "policy"),
        (SDPO(), [TeacherRefresh(None)], "initial"),
        (RLRT(), [TeacherRefresh(ema_decay=0.5)], "own"),
        (RLRT(), [], "policy"),
    ):
        model = module()
        model.method = method
        trainer(tmp_path, fast_dev_run=True, enable_checkpointing=False, callbacks=list(callbacks)).fit(model, data())
        assert model.teacher.weights == expected, (method, callbacks)
        assert hasattr(model.teacher, "model") == (expected != "policy")


def test_a_teachers_copy_does_not_outlive_the_run_that_needed_it(tmp_path: Path) -> None:
    model = module()
    trainer(tmp_path, max_epochs=1, callbacks=[TeacherRefresh(every_n_epochs=None)]).fit(model, data())
    assert hasattr(model.teacher, "model")
    trainer(tmp_path, max_epochs=1).fit(model, data())
    assert not hasattr(model.teacher, "model"), "it would go on scoring in place of the policy"


# -- the trainer ---------------------------------------------------------------------------------------------------


def test_settings_of_the_trainer_that_we_need_are_made(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_epochs=1)
    made.fit(module(), data())
    assert made.reload_dataloaders_every_n_epochs == 1
    assert made.log_every_n_steps == 1
    assert scalars(tmp_path)["eval/heldout/avg@8"][0][0] == 0, "measured before training"
    made = trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0, log_every_n_steps=2)
    made.fit(module(), data())
    assert made.log_every_n_steps == 2
    assert "eval/heldout/avg@8" not in scalars(tmp_path, 1)


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reload_dataloaders_every_n_epochs has to be 1"):
        trainer(tmp_path, reload_dataloaders_every_n_epochs=2).fit(module(), data())
    with pytest.raises(ConfigError, match=r"fit: pass datamodule=RolloutDataModule"):
        trainer(tmp_path).fit(module())
    with pytest.raises(ConfigError, match=r"validate: pass datamodule=RolloutDataModule"):
        trainer(tmp_path).validate(module(), datamodule=LightningDataModule())
    with pytest.raises(ConfigError, match=r"fit: pass datamodule=RolloutDataModule"):
        trainer(tmp_path).fit(module(), train_dataloaders=[1, 2])


# -- loggers -------------------------------------------------------------------------------------------------------


class Served(Logger):
    """One that keeps nothing on this machine, as MLflow's on a database or a server.

    Args:
        version: Name of the run.
        save_dir: Where it would keep something.
    """

    def __init__(self, version: str | int | None = "a1b2", save_dir: str | None = None) -> None:
        super().__init__()
        self.metrics: dict[str, float] = {}
        self._version, self._save_dir = version, save_dir

    @property
    def name(self) -> str | None:
        return "project"

    @property
    def version(self) -> str | int | None:
        return self._version

    @property
    def save_dir(self) -> str | None:
        return self._save_dir

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= metrics

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


@pytest.mark.parametrize(
    ("logger", "folder"),
    [
        (lambda root: False, None),
        (lambda root: CSVLogger(root, "csv"), "csv/version_0"),
        (lambda root: Served(), "project/a1b2"),
        (lambda root: Served(3), "project/version_3"),
        (lambda root: Served(save_dir="memory://runs"), "project/a1b2"),
        (lambda root: Served(save_dir=str(root / "wandb")), "wandb/project/a1b2"),
        (lambda root: [Served("first"), CSVLogger(root, "csv")], "project/first"),
    ],
    ids=["none", "csv", "no folder", "number", "web", "shared folder", "two"],
)
def test_a_run_has_a_folder_whatever_its_logger(
    logger: Any, folder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "root"
    made = trainer(root, logger=logger(root), max_epochs=1, check_val_every_n_epoch=1)
    made.fit(module(), data())
    made.validate(made.lightning_module, datamodule=data())
    found = run_folder(made)
    assert found.is_relative_to(root)
    assert folder is None or found == root / folder
    assert {"signal/epoch-0.html", "evaluation/heldout.jsonl"} <= files(found)
    if "memory" not in str(made.loggers and made.loggers[0].save_dir):
        assert "checkpoints/last.ckpt" in files(found)
    for each in made.loggers:
        if isinstance(each, Served):
            assert {"rollout/reward", "eval/heldout/avg@8"} <= each.metrics.keys()


@pytest.mark.parametrize("name", ["fit", "validate"])
def test_the_command_line_takes_a_logger_without_a_folder(name: str, tmp_path: Path) -> None:
    flags = ["--trainer.logger=tests.test_python.Served", f"--trainer.default_root_dir={tmp_path}"]
    assert command(name, tmp_path / "other", *flags, "--trainer.max_epochs=1") == 0
    written = {"fit": "checkpoints/last.ckpt", "validate": "evaluation/heldout.jsonl"}[name]
    assert {"project/a1b2/config.yaml", f"project/a1b2/{written}"} <= {
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")
    }
    assert not (tmp_path / "other").exists()
    if name == "fit":
        assert command("validate", tmp_path, *flags, "--ckpt_path=last") == 2, "the folder is that of `fit`"
        assert command("validate", tmp_path, *flags, "--trainer.logger.version=other", "--ckpt_path=last") == 0


@pytest.mark.filterwarnings("default")  # MLflow's and SQLAlchemy's own
def test_mlflow_on_a_database(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger("sums", tracking_uri=f"sqlite:///{tmp_path / 'runs.db'}")
    made = trainer(tmp_path, logger=logger, max_epochs=1)
    made.fit(module(), data())
    assert logger.save_dir is None
    folder = tmp_path / str(logger.name) / str(logger.version)
    assert {"signal/epoch-0.html", "checkpoints/last.ckpt"} <= files(folder)
