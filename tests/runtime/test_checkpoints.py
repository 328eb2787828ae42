"""Which weights a checkpoint holds, stops within an epoch, and refused settings of the trainer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint

from rlrt_lightning import Benchmark, ConfigError
from rlrt_lightning.callbacks.run_checkpoint import RunCheckpoint, adopt
from rlrt_lightning.runtime.trainer_checks import REFUSED, check_trainer
from tests.helpers.command_line import assert_continued, cli_exit_code, evaluation_scalars, scalars
from tests.helpers.marks import slow_except


def saved_checkpoints(folder: Path) -> dict[str, dict[str, Any]]:
    """The checkpoints of a run by the stem of their file name."""
    found = (folder / "last-digit" / "rlrt-0" / "checkpoints").glob("*.ckpt")
    return {path.stem: torch.load(path, weights_only=True) for path in found}


def monitored_scores(checkpoint: dict[str, Any]) -> dict[str, float]:
    """The monitored score of each checkpoint that the run has kept."""
    (state,) = [state for key, state in checkpoint["callbacks"].items() if key.startswith("RunCheckpoint")]
    return {Path(path).stem: float(score) for path, score in state["best_k_models"].items()}


def error_line(capfd: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    return line


# -- saved weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_on_train_epoch_end", slow_except(["true", "false"], "true"))
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # `validate` has other settings
def test_a_monitored_score_belongs_to_the_saved_weights_and_last_is_the_last_epoch(
    save_on_train_epoch_end: str, tmp_path: Path
) -> None:
    """Evaluates every second epoch, and keeps a checkpoint of each evaluation."""
    flags = ["--checkpoint.monitor=eval/heldout/avg@8", "--checkpoint.mode=max", "--checkpoint.save_top_k=5"]
    flags += [f"--checkpoint.save_on_train_epoch_end={save_on_train_epoch_end}", "--model.optimizer.lr=1e-3"]
    flags += ["--data.benchmarks={heldout: {limit: 6}}"]
    assert cli_exit_code("fit", tmp_path, *flags, "--trainer.max_epochs=5") == 0
    found = saved_checkpoints(tmp_path)
    assert {name: c["epoch"] for name, c in found.items()} == {"epoch-1": 1, "epoch-3": 3, "last": 4}
    logged = dict(scalars(tmp_path)["eval/heldout/avg@8"])
    assert monitored_scores(found["last"]) == {"epoch-1": logged[3], "epoch-3": logged[7]}
    for name, score in monitored_scores(found["last"]).items():
        path = tmp_path / "last-digit" / "rlrt-0" / "checkpoints" / f"{name}.ckpt"
        assert cli_exit_code("validate", tmp_path, f"--ckpt_path={path}", flags[-1]) == 0
        assert evaluation_scalars(tmp_path)["eval/heldout/avg@8"][0][1] == pytest.approx(score)


@pytest.mark.parametrize("save_last", slow_except(["true", "link"], "link"))
def test_last_is_the_last_epoch_even_when_the_best_is_older(save_last: str, tmp_path: Path) -> None:
    """A link would point to the best epoch."""
    flags = [
        f"--checkpoint.save_last={save_last}",
        "--checkpoint.monitor=rollout/length",
        "--checkpoint.mode=min",
        "--trainer.max_epochs=4",
    ]
    assert cli_exit_code("fit", tmp_path, *flags, "--model.optimizer.lr=0.0") == 0
    found = saved_checkpoints(tmp_path)
    assert found["last"]["epoch"] == 3
    (best,) = monitored_scores(found["last"])
    lengths = [value for _, value in scalars(tmp_path)["rollout/length"]]
    assert best == f"epoch-{lengths.index(min(lengths))}"
    assert lengths.index(min(lengths)) < 3, "the best epoch must not be the last"


def test_adopt_converts_plain_model_checkpoints_and_keeps_subclasses() -> None:
    class Mine(ModelCheckpoint): ...

    callbacks = [ModelCheckpoint(monitor="x"), Mine(), RunCheckpoint()]
    adopt(callbacks)
    assert [type(callback) for callback in callbacks] == [RunCheckpoint, Mine, RunCheckpoint]
    assert callbacks[0].monitor == "x"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["val_loss"], "checkpoint.monitor is val_loss, which is not logged (did you mean eval/heldout/avg@8?)"),
        pytest.param(
            ["eval/held/avg@8"],
            "is eval/held/avg@8, which is not logged (did you mean eval/heldout/avg@8?)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["eval/heldout/avg@16"],
            "is eval/heldout/avg@16, which is not logged (did you mean eval/heldout/avg@8?)",
            marks=pytest.mark.slow,
        ),
        (["teacher/accuracy"], "which measures the teacher instead of the policy; set it to eval/heldout/avg@8"),
        pytest.param(["eval/heldout/pass@4"], "which is not logged", marks=pytest.mark.slow),
        (["eval/heldout/pass@8", "--evaluation.ks=[2]"], "which is not logged"),
        (["eval/heldout/avg@8", "--trainer.limit_val_batches=0"], "trainer.limit_val_batches is 0"),
        (["eval/heldout/avg@8", "--trainer.check_val_every_n_epoch=9"], "(9) is above trainer.max_epochs (2)"),
        (
            ["eval/heldout/avg@8", "--trainer.val_check_interval=0.75", "--trainer.accumulate_grad_batches=2"],
            "val_check_interval evaluates within epochs",
        ),
        (["eval/heldout/lenght"], "is eval/heldout/lenght, which is not logged (did you mean eval/heldout/length?)"),
        (["rollout/rewrad"], "is rollout/rewrad, which is not logged (did you mean rollout/reward?)"),
    ],
    ids=str,
)
def test_monitoring_a_tag_that_is_never_logged_is_refused(
    flags: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = [f"--checkpoint.monitor={flags[0]}", *flags[1:], "--trainer.max_epochs=2"]
    assert cli_exit_code("fit", tmp_path, *args) == 2
    assert message in error_line(capfd)


SCORES = "avg@8 pass@8 avg@8_low pass@8_high".split()
RISING = [*(f"eval/heldout/{score}" for score in SCORES), "rollout/reward", "rollout/shaped_reward", "rollout/correct"]


def checked(callback: Any) -> None:
    """Checks the trainer of a run with one callback that monitors a tag."""
    kept = {"overfit_batches": 0, "limit_train_batches": 1.0, "fast_dev_run": False, "max_steps": -1}
    every = {"check_val_every_n_epoch": 1, "max_epochs": 2, "limit_val_batches": 1.0, "val_check_interval": 1.0}
    trainer = SimpleNamespace(callbacks=[callback], lightning_module=None, accumulate_grad_batches=1, **kept, **every)
    check_trainer(trainer, SimpleNamespace(benchmarks={"heldout": Benchmark(samples=8)}, minibatches=2))


@pytest.mark.parametrize("tag", [*RISING, "rewards/format", "groups/all_correct"])
def test_a_score_whose_lowest_value_would_count_as_the_best_is_refused(tag: str) -> None:
    """`mode: min` is Lightning's default."""
    with pytest.raises(ConfigError, match=r"checkpoint\.mode is min, which keeps .* lowest .* --checkpoint\.mode=max$"):
        checked(ModelCheckpoint(monitor=tag))
    with pytest.raises(ConfigError, match=r"EarlyStopping\.mode is min, .* set EarlyStopping\.mode to max$"):
        checked(EarlyStopping(tag))
    checked(ModelCheckpoint(monitor=tag, mode="max"))
    checked(EarlyStopping(tag, mode="max"))


@pytest.mark.parametrize("tag", ["eval/heldout/truncated", "eval/heldout/length", "rollout/length", "train/kl"])
def test_other_metrics_can_be_minimized(tag: str) -> None:
    checked(ModelCheckpoint(monitor=tag))


def test_a_monitored_score_without_its_mode_ends_the_command_line_before_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli_exit_code("fit", tmp_path, "--checkpoint.monitor=eval/heldout/avg@8") == 2
    assert error_line(capfd) == (
        "error: checkpoint.monitor is eval/heldout/avg@8, but checkpoint.mode is min, which keeps the checkpoints with "
        "its lowest values; set --checkpoint.mode=max"
    )
    assert not list(tmp_path.rglob("*"))


def test_fast_dev_run_writes_no_checkpoint_and_no_export(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = f"--trainer.default_root_dir={tmp_path / 'root'}"
    assert cli_exit_code("fit", tmp_path, "--trainer.fast_dev_run=2", root, "--trainer.callbacks+=HFExport") == 0
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not list(tmp_path.rglob("*.safetensors"))
    assert cli_exit_code("fit", tmp_path, "--ckpt_path=last", root) == 2
    assert "there is no checkpoint" in error_line(capfd)


# -- stopping ------------------------------------------------------------------------------------------------------


class StopsInSecondEpoch(Callback):
    """Requests a stop during the second epoch.

    Args:
        hook: The hook that requests it.
    """

    def __init__(self, hook: str) -> None:
        self.done = False
        setattr(self, hook, self.stop)

    def stop(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.current_epoch == 1 and not self.done and not trainer.sanity_checking:
            self.done = trainer.should_stop = True


@pytest.mark.parametrize(
    "hook",
    slow_except(
        ["on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_validation_end"],
        "on_train_batch_start",
    ),
)
def test_a_stop_within_an_epoch_takes_effect_after_its_last_step(hook: str, tmp_path: Path) -> None:
    """As a time limit or early stopping requests it; validation also runs within the epoch."""
    flags = ["--trainer.accumulate_grad_batches=2", "--trainer.check_val_every_n_epoch=1"]
    flags += ["--trainer.val_check_interval=0.5", "--data.benchmarks={heldout: {samples: 2, limit: 2}}"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli_exit_code("fit", whole, *flags, "--trainer.max_epochs=3") == 0
    stops = [
        "--trainer.callbacks+=tests.runtime.test_checkpoints.StopsInSecondEpoch",
        f"--trainer.callbacks.hook={hook}",
    ]
    assert cli_exit_code("fit", cut, *flags, *stops, "--trainer.max_epochs=3") == 0
    assert [step for step, _ in scalars(cut)["train/loss"]] == [1, 3], "it ends after the second epoch"
    assert cli_exit_code("fit", cut, *flags, "--trainer.max_epochs=3", "--ckpt_path=last") == 0
    assert_continued(cut, whole)


def test_a_time_limit_ends_the_run_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    limit = ["--trainer.max_time=00:00:00:01", "--data.minibatches=8"]
    assert cli_exit_code("fit", tmp_path, *limit, "--trainer.max_epochs=500") == 0
    found = saved_checkpoints(tmp_path)["last"]
    assert found["global_step"] == 8 * (found["epoch"] + 1)
    assert "under_way" not in found["RolloutDataModule"]


# -- refused settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--data.tokens_per_pass=100", "--trainer.accumulate_grad_batches=2"],
            "trainer.accumulate_grad_batches is 2, but data.tokens_per_pass sets the number of micro-batches",
        ),
        (["--trainer.max_steps=3"], "trainer.max_steps is 3, which ends within an epoch; set it to a multiple of"),
        pytest.param(["--trainer.limit_train_batches=0"], "trainer.limit_train_batches is 0", marks=pytest.mark.slow),
        (["--trainer.limit_train_batches=0.5"], "trainer.limit_train_batches is 0.5"),
        pytest.param(["--trainer.limit_train_batches=1"], "trainer.limit_train_batches is 1,", marks=pytest.mark.slow),
        (["--trainer.overfit_batches=1"], "trainer.overfit_batches is 1"),
        (["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=1e-4"], "EMAWeightAveraging"),
        pytest.param(
            ["--trainer.callbacks+=LearningRateFinder"], "LearningRateFinder cannot be used", marks=pytest.mark.slow
        ),
        (["--trainer.callbacks+=BatchSizeFinder"], "BatchSizeFinder cannot be used"),
        (["--trainer.callbacks+=OnExceptionCheckpoint", "--trainer.callbacks.dirpath=x"], "OnExceptionCheckpoint"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")  # Lightning itself warns of some of these settings
def test_settings_that_would_change_what_is_trained_are_refused(
    flags: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli_exit_code("fit", tmp_path, *flags) == 2
    assert message in error_line(capfd)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_every_refused_callback_exists_in_lightning() -> None:
    from lightning.pytorch import callbacks

    for name in REFUSED:
        assert issubclass(getattr(callbacks, name), Callback)


def test_an_accumulation_schedule_is_refused() -> None:
    trainer: Any = type("Trainer", (), {"callbacks": [GradientAccumulationScheduler({0: 1, 2: 4})]})()
    with pytest.raises(ConfigError, match=r"set trainer\.accumulate_grad_batches"):
        check_trainer(trainer, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.callbacks+=EMAWeightAveraging"],
        pytest.param(["--trainer.callbacks+=LearningRateMonitor"], marks=pytest.mark.slow),
        pytest.param(["--trainer.precision=64-true"], marks=pytest.mark.slow),
        pytest.param(["--trainer.detect_anomaly=true"], marks=pytest.mark.slow),
        pytest.param(["--trainer.max_steps=4", "--trainer.max_epochs=-1"], marks=pytest.mark.slow),
        ["--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=3"],
        pytest.param(["--trainer.gradient_clip_algorithm=value"], marks=pytest.mark.slow),
        pytest.param(["--trainer.accumulate_grad_batches=40"], marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_other_lightning_settings_keep_all_optimizer_steps(flags: list[str], tmp_path: Path) -> None:
    assert cli_exit_code("fit", tmp_path, "--trainer.max_epochs=2", *flags) == 0
    assert saved_checkpoints(tmp_path)["last"]["global_step"] == 4
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [1, 3]
