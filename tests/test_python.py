"""`Trainer(...).fit(module, datamodule)` and the other methods, called from Python, match the command line."""

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
    LastDigit,
    Policy,
    RLRTModule,
    RolloutDataModule,
    Sampling,
    Teacher,
)
from rlrt_lightning.callbacks import Evaluation, ReversedSignalLogger, TeacherRefresh
from rlrt_lightning.runtime.run_files import run_folder
from rlrt_lightning.tasks.last_digit import TEACHER_TEMPLATE
from tests.helpers.command_line import cli_exit_code, scalars, weights, without_timings
from tests.helpers.marks import slow_except

OURS = [
    "EpochMetrics",
    "SafeStop",
    "Dashboard",
    "PromptPreview",
    "MemoryEstimate",
    "TeacherRefresh",
    "ReversedSignalLogger",
]
OURS += ["Evaluation", "TeacherEvaluation", "RankGuard", "NumberGuard", "CollapseGuard", "RunReport", "RunCheckpoint"]


def module() -> RLRTModule:
    """The module of configs/rlrt.yaml."""
    adamw = lambda params: torch.optim.AdamW(params, lr=2e-4, weight_decay=0.0)  # noqa: E731
    return RLRTModule(Policy(), Teacher(TEACHER_TEMPLATE), optimizer=adamw, warmup_steps=0)


def data(**settings: Any) -> RolloutDataModule:
    """The data module of configs/rlrt.yaml and tests/test_fit.py."""
    longer = Benchmark(task=LastDigit(digits=(7, 8)), limit=3)
    benchmarks = {"heldout": Benchmark(limit=6), "longer": longer}
    given = {"sampling": Sampling(max_new_tokens=32), "prompts_per_epoch": 8, "benchmarks": benchmarks, **settings}
    return RolloutDataModule(**given)


def trainer(folder: Path, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    as_in_config = {"max_epochs": 2, "check_val_every_n_epoch": 2, "gradient_clip_val": 1.0, "default_root_dir": folder}
    if not settings.get("barebones"):
        as_in_config["logger"] = TensorBoardLogger(folder, "last-digit")
    return Trainer(**{**quiet, **as_in_config, **settings})


def our_callbacks(used: Trainer) -> list[str]:
    return [type(callback).__name__ for callback in used.callbacks if type(callback).__name__ in OURS]


def files(folder: Path) -> set[str]:
    """The files in a folder, without event files and the config that only the command line writes."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if "events.out" not in name and name != "config.yaml"}


@pytest.fixture(scope="module")
def cli_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four epochs from the command line."""
    folder = tmp_path_factory.mktemp("command")
    assert cli_exit_code("fit", folder, "--trainer.max_epochs=4") == 0
    return folder


def assert_same_run(folder: Path, cli_run: Path, since: int = 0) -> None:
    """Metrics from step `since` on and the final weights must be equal."""
    expected, found = without_timings(scalars(cli_run)), without_timings(scalars(folder))
    assert found.keys() == expected.keys() or since
    for tag, curve in found.items():
        assert curve == [(step, value) for step, value in expected[tag] if step >= since], tag
    for name, value in weights(cli_run).items():
        assert torch.equal(value, weights(folder)[name]), name


def test_fit_from_python_equals_fit_from_the_command_line(cli_run: Path, tmp_path: Path) -> None:
    fitted = trainer(tmp_path, max_epochs=4)
    fitted.fit(module(), data())
    assert_same_run(tmp_path, cli_run)
    assert our_callbacks(fitted) == OURS
    assert files(run_folder(fitted)) == files(cli_run / "last-digit" / "rlrt-0")


def test_python_resumes_a_run_of_the_command_line(cli_run: Path, tmp_path: Path) -> None:
    """The metrics continue as in the uninterrupted run of the command line."""
    assert cli_exit_code("fit", tmp_path / "first", "--trainer.max_epochs=2") == 0
    (last,) = tmp_path.glob("first/last-digit/rlrt-0/checkpoints/last.ckpt")
    resumed = trainer(tmp_path, max_epochs=4)
    resumed.fit(module(), data(), ckpt_path=last)
    assert_same_run(tmp_path, cli_run, since=4)
    assert without_timings(scalars(tmp_path))["eval/heldout/avg@8"][0][0] == 7, "no second evaluation before training"


@pytest.mark.parametrize("name", slow_except(["validate", "test", "predict"], "predict"))
def test_evaluations_from_python_equal_those_of_the_command_line(name: str, cli_run: Path, tmp_path: Path) -> None:
    (last,) = cli_run.glob("last-digit/rlrt-0/checkpoints/last.ckpt")
    assert cli_exit_code(name, tmp_path, f"--ckpt_path={last}") == 0
    used = trainer(tmp_path)
    found = getattr(used, name)(module(), datamodule=data(), ckpt_path=last)
    (there,) = cli_run.glob("last-digit/rlrt-0/evaluation/step-8")
    here = run_folder(used) / "evaluation" / "step-8"
    assert files(there) - {"hparams.yaml"} == files(here)
    for file in ("heldout.jsonl", "longer.jsonl", "heldout.json", "pass_at_k.csv"):
        assert (there / file).read_bytes() == (here / file).read_bytes()
    if name != "predict":
        assert found[0]["eval/heldout/avg@8"] == dict(scalars(cli_run)["eval/heldout/avg@8"])[7]


def test_validate_with_a_plain_trainer_returns_metrics(tmp_path: Path) -> None:
    """With only a trainer, as in the documentation."""
    made = Trainer(logger=False, default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False)
    metrics = made.validate(module(), datamodule=data())
    assert {"eval/heldout/avg@8", "eval/longer/pass@8"} <= metrics[0].keys()
    assert (run_folder(made) / "evaluation" / "step-0" / "pass_at_k.csv").exists()


# -- callbacks -----------------------------------------------------------------------------------------------------


class MySignals(ReversedSignalLogger):
    """A user's subclass."""


def test_the_users_callbacks_replace_the_default_ones(tmp_path: Path) -> None:
    own = [MySignals(picture_every_n_epochs=0), Evaluation(ks=[1], table=0), TeacherRefresh(2, 0.5)]
    model, made = module(), trainer(tmp_path, callbacks=list(own), max_epochs=1, check_val_every_n_epoch=1)
    made.fit(model, data())
    assert all(callback in made.callbacks for callback in own)
    assert sorted(our_callbacks(made)) == sorted(set(OURS) - {"ReversedSignalLogger"})
    assert model.teacher.weights == "own"
    assert "eval/heldout/pass@1" in scalars(tmp_path)
    assert "eval/heldout/pass@8" not in scalars(tmp_path)
    assert not (run_folder(made) / "signal").exists()


@pytest.mark.parametrize("method", ["fit", "validate"])
def test_default_checkpoints_get_our_settings_and_the_users_keep_theirs(method: str, tmp_path: Path) -> None:
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


def test_enable_checkpointing_false_writes_no_checkpoint(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    made.fit(module(), data())
    assert our_callbacks(made) == OURS[:-1]
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"barebones": True}], ids=str)
@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_fast_dev_run_and_barebones_run(settings: dict[str, Any], tmp_path: Path) -> None:
    made = trainer(tmp_path, max_epochs=1, **settings)
    made.fit(module(), data())
    assert made.global_step > 0
    assert set(OURS[:-1]) <= set(our_callbacks(made))
    made.validate(made.lightning_module, datamodule=data())


# -- repeated runs -------------------------------------------------------------------------------------------------


def test_one_data_module_gives_every_run_the_same_rollouts(cli_run: Path, tmp_path: Path) -> None:
    """As in a notebook that compares two methods."""
    both = data()
    trainer(tmp_path / "first", max_epochs=1).fit(module(), both)
    trainer(tmp_path / "second", max_epochs=4).fit(module(), both)
    assert_same_run(tmp_path / "second", cli_run)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # by the trainer itself
def test_a_trained_module_can_be_evaluated_and_trained_further(cli_run: Path, tmp_path: Path) -> None:
    model, made = module(), trainer(tmp_path, max_epochs=2)
    made.fit(model, data())
    before = made.validate(model, datamodule=data())
    assert made.test(model, datamodule=data()) == before
    assert our_callbacks(made) == OURS, "each callback once"
    made.fit_loop.max_epochs = 4
    made.fit(model, made.datamodule)
    assert made.current_epoch == 4
    again = trainer(tmp_path, max_epochs=1)
    again.fit(model, data())
    assert our_callbacks(again) == OURS
    assert not set(map(id, again.callbacks)) & set(map(id, made.callbacks))


def test_the_teacher_follows_the_method_unless_the_users_callback_overrides_it(tmp_path: Path) -> None:
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
        made = trainer(tmp_path, fast_dev_run=True, enable_checkpointing=False, callbacks=list(callbacks))
        made.fit(model, data(prompts_per_epoch=2, benchmarks={}))
        assert model.teacher.weights == expected, (method, callbacks)
        assert hasattr(model.teacher, "model") == (expected != "policy")


def test_a_teachers_copy_is_removed_when_the_next_run_needs_none(tmp_path: Path) -> None:
    model = module()
    trainer(tmp_path, max_epochs=1, callbacks=[TeacherRefresh(every_n_epochs=None)]).fit(model, data())
    assert hasattr(model.teacher, "model")
    trainer(tmp_path, max_epochs=1).fit(model, data())
    assert not hasattr(model.teacher, "model"), "it would still score instead of the policy"


# -- the trainer ---------------------------------------------------------------------------------------------------


def test_required_trainer_settings_are_applied(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_epochs=1)
    made.fit(module(), data())
    assert made.reload_dataloaders_every_n_epochs == 1
    assert made.log_every_n_steps == 1
    assert scalars(tmp_path)["eval/heldout/avg@8"][0][0] == 0, "evaluated before training"
    made = trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0, log_every_n_steps=2)
    made.fit(module(), data())
    assert made.log_every_n_steps == 2
    assert "eval/heldout/avg@8" not in scalars(tmp_path, 1)


def test_a_wrong_trainer_setting_or_data_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reload_dataloaders_every_n_epochs has to be 1"):
        trainer(tmp_path, reload_dataloaders_every_n_epochs=2).fit(module(), data())
    with pytest.raises(ConfigError, match=r"fit: pass datamodule=RolloutDataModule"):
        trainer(tmp_path).fit(module())
    with pytest.raises(ConfigError, match=r"validate: pass datamodule=RolloutDataModule"):
        trainer(tmp_path).validate(module(), datamodule=LightningDataModule())
    with pytest.raises(ConfigError, match=r"fit: pass datamodule=RolloutDataModule"):
        trainer(tmp_path).fit(module(), train_dataloaders=[1, 2])


# -- loggers -------------------------------------------------------------------------------------------------------


class RemoteLogger(Logger):
    """A logger that keeps nothing on this machine, like MLflow's with a database or a server.

    Args:
        version: Name of the run.
        save_dir: Where it would store files.
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
        (lambda root: RemoteLogger(), "project/a1b2"),
        pytest.param(lambda root: RemoteLogger(3), "project/version_3", marks=pytest.mark.slow),
        (lambda root: RemoteLogger(save_dir="memory://runs"), "project/a1b2"),
        pytest.param(
            lambda root: RemoteLogger(save_dir=str(root / "wandb")), "wandb/project/a1b2", marks=pytest.mark.slow
        ),
        (lambda root: [RemoteLogger("first"), CSVLogger(root, "csv")], "project/first"),
    ],
    ids=["none", "csv", "no folder", "number", "url", "shared folder", "two loggers"],
)
def test_a_run_has_a_local_folder_with_any_logger(
    logger: Any, folder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "root"
    made = trainer(root, logger=logger(root), max_epochs=1, num_sanity_val_steps=0)
    benchmarks = {"heldout": Benchmark(limit=2)}
    made.fit(module(), data(benchmarks=benchmarks))
    made.validate(made.lightning_module, datamodule=data(benchmarks=benchmarks))
    found = run_folder(made)
    assert found.is_relative_to(root)
    assert folder is None or found == root / folder
    assert {"signal/epoch-1.html", "evaluation/step-2/heldout.jsonl"} <= files(found)
    if "memory" not in str(made.loggers and made.loggers[0].save_dir):
        assert "checkpoints/last.ckpt" in files(found)
    for each in made.loggers:
        if isinstance(each, RemoteLogger):
            assert {"rollout/reward", "eval/heldout/avg@8"} <= each.metrics.keys()


@pytest.mark.parametrize("name", ["fit", "validate"])
def test_the_command_line_accepts_a_logger_without_a_folder(name: str, tmp_path: Path) -> None:
    flags = ["--trainer.logger=tests.test_python.RemoteLogger", f"--trainer.default_root_dir={tmp_path}"]
    assert cli_exit_code(name, tmp_path / "other", *flags, "--trainer.max_epochs=1") == 0
    run = tmp_path / "runs" / "last-digit" / ("rlrt-0" if name == "fit" else "evaluation")
    assert {"config.yaml", {"fit": "checkpoints/last.ckpt", "validate": "heldout.jsonl"}[name]} <= files(run) | {
        path.name for path in run.iterdir()
    }
    if name == "fit":
        assert cli_exit_code("validate", tmp_path, *flags, "--ckpt_path=last") == 0
        assert "heldout.jsonl" in files(run / "evaluation" / "step-2")


@pytest.mark.filterwarnings("default")  # from MLflow and SQLAlchemy
def test_a_run_with_mlflow_on_a_database_writes_local_files(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger("sums", tracking_uri=f"sqlite:///{tmp_path / 'runs.db'}")
    made = trainer(tmp_path, logger=logger, max_epochs=1)
    made.fit(module(), data())
    assert logger.save_dir is None
    folder = tmp_path / str(logger.name) / str(logger.version)
    assert {"signal/epoch-1.html", "checkpoints/last.ckpt"} <= files(folder)
