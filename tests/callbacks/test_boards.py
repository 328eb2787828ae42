"""Pictures, texts and tables in TensorBoard, W&B and MLflow. The loggers of the latter two are doubles with Lightning's
signatures; MLflow's client has the signatures of mlflow 3."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock, create_autospec

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from rlrt_lightning.analysis.events import event_log, scalars
from rlrt_lightning.callbacks.boards import CONTINUED, log_picture, log_table, log_text, markdown
from rlrt_lightning.runtime.tensorboard import BoardLogger, adopt, logged_tag, logger_names, shown_tag


class MlflowClient:
    """The methods of mlflow's client that are called."""

    def log_image(
        self,
        run_id: str,
        image: Any,
        artifact_file: str | None = None,
        key: str | None = None,
        step: int | None = None,
        timestamp: int | None = None,
        synchronous: bool | None = None,
    ) -> None: ...

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None: ...

    def log_table(self, run_id: str, data: dict[str, Any], artifact_file: str) -> None: ...


def wandb_logger() -> Any:
    return create_autospec(WandbLogger, instance=True)


def mlflow_logger() -> Any:
    logger = create_autospec(MLFlowLogger, instance=True)
    logger.experiment, logger.run_id = create_autospec(MlflowClient, instance=True), "r1"
    return logger


def trainer(*loggers: Any, rank: int = 0) -> Any:
    return SimpleNamespace(loggers=list(loggers), is_global_zero=rank == 0)


IMAGE = np.zeros((4, 6, 3), np.uint8)
LONG = "a " * 60 + "\n\n  b"


def log_all(used: Any) -> None:
    log_picture(used, "signal/rollouts", IMAGE, 4)
    log_text(used, "prompts/student", LONG, 0)
    log_table(used, "samples/heldout", ["prompt", "verdict"], [["1 + 1", "✓ right"], ["2 + 2", "✗ no"]], 4)


def test_tensorboard_shows_pictures_tables_and_whole_lines_of_text(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "", "")
    log_all(trainer(logger))
    logger.save()
    log = event_log(tmp_path, "images", "tensors")
    assert [event.step for event in log.Images("signal/rollouts")] == [4]
    texts = {tag: log.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in log.Tags()["tensors"]}
    lines = texts["prompts/student/text_summary"].split("\n")
    assert all(line.startswith("    ") and len(line) <= 96 for line in lines)
    assert "\n".join(line[4:] for line in lines).replace(f"\n{CONTINUED}", "") == LONG
    assert texts["samples/heldout/text_summary"].splitlines()[2] == "| `1 + 1` | `✓ right` |"


def test_wandb_gets_pictures_tables_and_texts() -> None:
    logger = wandb_logger()
    log_all(trainer(logger))
    logger.log_image.assert_called_once_with("signal/rollouts", [IMAGE], 4)
    text, table = logger.log_text.call_args_list
    assert (text.args, text.kwargs) == (("prompts/student",), {"columns": ["text"], "data": [[LONG]], "step": 0})
    assert table.kwargs == {
        "columns": ["prompt", "verdict"],
        "data": [["1 + 1", "✓ right"], ["2 + 2", "✗ no"]],
        "step": 4,
    }


def test_mlflow_gets_pictures_with_steps_and_appends_tables() -> None:
    logger = mlflow_logger()
    log_all(trainer(logger))
    client: Mock = logger.experiment
    client.log_image.assert_called_once_with("r1", IMAGE, key="signal/rollouts", step=4)
    client.log_text.assert_called_once_with("r1", LONG, "prompts/student.txt")
    data = {"step": [4, 4], "prompt": ["1 + 1", "2 + 2"], "verdict": ["✓ right", "✗ no"]}
    client.log_table.assert_called_once_with("r1", data, "samples/heldout.json")
    log_table(trainer(logger), "samples/heldout", ["prompt"], [], 5)
    assert client.log_table.call_count == 1, "a table without rows adds nothing"


def test_other_ranks_and_other_loggers_get_nothing(tmp_path: Path) -> None:
    boards = wandb_logger(), mlflow_logger()
    log_all(trainer(*boards, TensorBoardLogger(tmp_path / "tb"), rank=1))
    log_all(trainer(CSVLogger(tmp_path / "csv")))
    assert not any(board.mock_calls for board in boards)
    assert not list(tmp_path.iterdir())


def test_a_long_cell_loses_its_middle() -> None:
    (row,) = markdown(["completion"], [["a" * 1000 + "b" * 1000]]).splitlines()[2:]
    assert row == f"| `{'a' * 750} … {'b' * 750}` |"


# -- tags in TensorBoard -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["eval/heldout/avg@8_low", "eval/a/b_low/pass@16_high", "teacher/accuracy_low"])
def test_bounds_have_a_group_of_their_own(tag: str) -> None:
    assert shown_tag(tag) == f"intervals/{tag}"
    assert logged_tag(shown_tag(tag)) == tag


@pytest.mark.parametrize("tag", ["eval/heldout/avg@8", "eval/heldout/labels/very_low", "rollout/reward"])
def test_other_metrics_keep_their_tags(tag: str) -> None:
    assert shown_tag(tag) == logged_tag(tag) == tag


def test_adopted_loggers_hide_epochs_and_readers_find_every_metric(tmp_path: Path) -> None:
    plain, csv = TensorBoardLogger(tmp_path, "", ""), CSVLogger(tmp_path)
    mine = type("Mine", (TensorBoardLogger,), {})(tmp_path / "mine")
    names = logger_names([plain, csv, mine])
    adopt([plain, csv, mine])
    assert logger_names([plain, csv, mine]) == names == ["TensorBoardLogger", "CSVLogger", "Mine"]
    assert (type(plain), type(csv), type(mine).__name__) == (BoardLogger, CSVLogger, "Mine")
    plain.log_metrics({"eval/heldout/avg@8": 0.5, "eval/heldout/avg@8_low": 0.25, "epoch": 3}, step=7)
    plain.save()
    assert set(event_log(tmp_path, "scalars").Tags()["scalars"]) == {
        "eval/heldout/avg@8",
        "intervals/eval/heldout/avg@8_low",
    }
    assert scalars(tmp_path) == {"eval/heldout/avg@8": [(7, 0.5)], "eval/heldout/avg@8_low": [(7, 0.25)]}
    assert cast(Any, plain).save_dir == str(tmp_path)
