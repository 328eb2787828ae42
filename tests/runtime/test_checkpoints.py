"""Which weights a checkpoint holds, and what ends a run within an epoch or trains otherwise than it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from rlrt_lightning import ConfigError
from rlrt_lightning.callbacks.run_checkpoint import RunCheckpoint, adopt
from rlrt_lightning.runtime.trainer_checks import REFUSED, check_trainer
from tests.helpers.command_line import command, comparable, scalars, union, weights


def saved(folder: Path, version: int = 0) -> dict[str, dict[str, Any]]:
    found = (folder / "rlrt" / f"version_{version}" / "checkpoints").glob("*.ckpt")
    return {path.stem: torch.load(path, weights_only=True) for path in found}


def scores(checkpoint: dict[str, Any]) -> dict[str, float]:
    """The score that each checkpoint of a run was saved with."""
    (state,) = [state for key, state in checkpoint["callbacks"].items() if key.startswith("RunCheckpoint")]
    return {Path(path).stem: float(score) for path, score in state["best_k_models"].items()}


def error(capfd: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    return line


# -- which weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_on_train_epoch_end", ["true", "false"])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # `validate` has other settings
def test_a_monitored_score_is_of_the_saved_weights_and_last_is_the_last_epoch(
    save_on_train_epoch_end: str, tmp_path: Path
) -> None:
    """Evaluated every second epoch, and saved whenever there is something to save."""
    flags = ["--checkpoint.monitor=eval/heldout/avg@8", "--checkpoint.mode=max", "--checkpoint.save_top_k=5"]
    flags += [f"--checkpoint.save_on_train_epoch_end={save_on_train_epoch_end}", "--model.optimizer.lr=1e-3"]
    assert command("fit", tmp_path, *flags, "--trainer.max_epochs=5") == 0
    found = saved(tmp_path)
    assert {name: c["epoch"] for name, c in found.items()} == {"epoch-1": 1, "epoch-3": 3, "last": 4}
    logged = dict(scalars(tmp_path)["eval/heldout/avg@8"])
    assert scores(found["last"]) == {"epoch-1": logged[3], "epoch-3": logged[7]}
    for version, (name, score) in enumerate(scores(found["last"]).items(), 1):
        path = tmp_path / "rlrt" / "version_0" / "checkpoints" / f"{name}.ckpt"
        assert command("validate", tmp_path, f"--ckpt_path={path}") == 0
        assert scalars(tmp_path, version)["eval/heldout/avg@8"][0][1] == pytest.approx(score)


def test_last_is_the_last_epoch_also_where_the_best_was_long_ago(tmp_path: Path) -> None:
    flags = ["--checkpoint.monitor=rollout/length", "--checkpoint.mode=min", "--trainer.max_epochs=4"]
    assert command("fit", tmp_path, *flags, "--model.optimizer.lr=0.0") == 0
    found = saved(tmp_path)
    assert found["last"]["epoch"] == 3
    (best,) = scores(found["last"])
    lengths = [value for _, value in scalars(tmp_path)["rollout/length"]]
    assert best == f"epoch-{lengths.index(min(lengths))}"
    assert lengths.index(min(lengths)) < 3, "the case is none"


def test_a_checkpoint_of_the_users_own_does_the_same() -> None:
    class Mine(ModelCheckpoint): ...

    callbacks = [ModelCheckpoint(monitor="x"), Mine(), RunCheckpoint()]
    adopt(callbacks)
    assert [type(callback) for callback in callbacks] == [RunCheckpoint, Mine, RunCheckpoint]
    assert callbacks[0].monitor == "x"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["val_loss"], "checkpoint.monitor is val_loss, which is not logged (did you mean eval/heldout/avg@8?)"),
        (["eval/held/avg@8"], "is eval/held/avg@8, which is not logged (did you mean eval/heldout/avg@8?)"),
        (["eval/heldout/avg@16"], "is eval/heldout/avg@16, which is not logged (did you mean eval/heldout/avg@8?)"),
        (["eval/heldout/pass@4"], "which is not logged"),
        (["eval/heldout/pass@8", "--evaluation.ks=[2]"], "which is not logged"),
        (["eval/heldout/avg@8", "--trainer.limit_val_batches=0"], "trainer.limit_val_batches is 0"),
        (["eval/heldout/avg@8", "--trainer.check_val_every_n_epoch=9"], "(9) is above trainer.max_epochs (2)"),
        (
            ["eval/heldout/avg@8", "--trainer.val_check_interval=0.75", "--trainer.accumulate_grad_batches=2"],
            "val_check_interval evaluates within epochs",
        ),
        (["rollout/rewrad"], "is rollout/rewrad, which is not logged (did you mean rollout/reward?)"),
    ],
    ids=str,
)
def test_a_tag_that_is_never_logged_is_one_line(
    flags: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [f"--checkpoint.monitor={flags[0]}", *flags[1:], "--trainer.max_epochs=2"]
    assert command("fit", tmp_path, *words) == 2
    assert said in error(capfd)


def test_fast_dev_run_leaves_no_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = f"--trainer.default_root_dir={tmp_path / 'root'}"
    assert command("fit", tmp_path, "--trainer.fast_dev_run=2", root, "--trainer.callbacks+=HFExport") == 0
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not list(tmp_path.rglob("*.safetensors"))
    assert command("fit", tmp_path, "--ckpt_path=last", root) == 2
    assert "there is no checkpoint" in error(capfd)


# -- where a run ends ----------------------------------------------------------------------------------------------


class Stops(Callback):
    """Asks for the end within the second epoch.

    Args:
        hook: In which hook.
    """

    def __init__(self, hook: str) -> None:
        self.done = False
        setattr(self, hook, self.stop)

    def stop(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.current_epoch == 1 and not self.done and not trainer.sanity_checking:
            self.done = trainer.should_stop = True


@pytest.mark.parametrize(
    "hook",
    [
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_train_batch_end",
        "on_validation_end",
    ],
)
def test_a_stop_within_an_epoch_loses_none_of_its_steps(hook: str, tmp_path: Path) -> None:
    """As by a time limit or by early stopping; the validation is one within the epoch."""
    flags = ["--trainer.accumulate_grad_batches=2", "--trainer.check_val_every_n_epoch=1"]
    flags += ["--trainer.val_check_interval=0.5", "--data.prompts_per_epoch=8"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command("fit", whole, *flags, "--trainer.max_epochs=3") == 0
    stops = ["--trainer.callbacks+=tests.runtime.test_checkpoints.Stops", f"--trainer.callbacks.hook={hook}"]
    assert command("fit", cut, *flags, *stops, "--trainer.max_epochs=3") == 0
    assert [step for step, _ in scalars(cut)["train/loss"]] == [1, 3], "it ends after the second epoch"
    assert command("fit", cut, *flags, "--trainer.max_epochs=3", "--ckpt_path=last") == 0
    assert union(cut) == comparable({tag: dict(curve) for tag, curve in scalars(whole).items()})
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(cut, version=1)[name]), name


def test_a_time_limit_ends_a_run_after_an_epoch(tmp_path: Path) -> None:
    limit = ["--trainer.max_time=00:00:00:01", "--data.minibatches=8"]
    assert command("fit", tmp_path, *limit, "--trainer.max_epochs=500") == 0
    found = saved(tmp_path)["last"]
    assert found["global_step"] == 8 * (found["epoch"] + 1)
    assert "under_way" not in found["RolloutDataModule"]


# -- what cannot work here -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trainer.max_steps=3"], "trainer.max_steps is 3, which ends within an epoch: take a multiple of"),
        (["--trainer.limit_train_batches=0"], "trainer.limit_train_batches is 0"),
        (["--trainer.limit_train_batches=0.5"], "trainer.limit_train_batches is 0.5"),
        (["--trainer.limit_train_batches=1"], "trainer.limit_train_batches is 1,"),
        (["--trainer.overfit_batches=1"], "trainer.overfit_batches is 1"),
        (["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=1e-4"], "EMAWeightAveraging"),
        (["--trainer.callbacks+=LearningRateFinder"], "LearningRateFinder cannot be used"),
        (["--trainer.callbacks+=BatchSizeFinder"], "BatchSizeFinder cannot be used"),
        (["--trainer.callbacks+=OnExceptionCheckpoint", "--trainer.callbacks.dirpath=x"], "OnExceptionCheckpoint"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")  # Lightning's own of these settings
def test_what_would_train_otherwise_than_it_says_is_refused(
    flags: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("fit", tmp_path, *flags) == 2
    assert said in error(capfd)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_callbacks_that_are_refused_are_there_in_lightning() -> None:
    from lightning.pytorch import callbacks

    for name in REFUSED:
        assert issubclass(getattr(callbacks, name), Callback)


def test_an_accumulation_that_changes_is_refused() -> None:
    trainer: Any = type("Trainer", (), {"callbacks": [GradientAccumulationScheduler({0: 1, 2: 4})]})()
    with pytest.raises(ConfigError, match=r"set trainer\.accumulate_grad_batches"):
        check_trainer(trainer, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.callbacks+=EMAWeightAveraging"],
        ["--trainer.callbacks+=LearningRateMonitor"],
        ["--trainer.precision=64-true"],
        ["--trainer.detect_anomaly=true"],
        ["--trainer.max_steps=4", "--trainer.max_epochs=-1"],
        ["--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=3"],
        ["--trainer.gradient_clip_algorithm=value"],
        ["--trainer.accumulate_grad_batches=40"],
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_what_lightning_offers_beside_takes_all_steps(flags: list[str], tmp_path: Path) -> None:
    assert command("fit", tmp_path, "--trainer.max_epochs=2", *flags) == 0
    assert saved(tmp_path)["last"]["global_step"] == 4
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == [1, 3]
