"""The arrangement of TensorBoard's pages, and the settings that loggers get."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rlrt_lightning.analysis.events import event_log
from rlrt_lightning.callbacks.dashboard import EVALUATION, SIGNAL, columns, layout
from rlrt_lightning.callbacks.signal_pages import link_pages, page_path
from tests.helpers.command_line import TRAIN_ONLY, cli_exit_code, runs_in
from tests.helpers.epochs import RuleTask


def load(path: Path) -> Any:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return EventFileLoader(str(path)).Load()


CONFIG = "custom_scalars__config__"
SCORES = ["eval/heldout/avg@8", "eval/heldout/pass@8", "eval/longer/avg@8", "eval/longer/pass@8"]
TEACHER = ["teacher/accuracy", "teacher/student_accuracy"]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch that was resumed for another one."""
    folder = tmp_path_factory.mktemp("run")
    for epochs in (1, 2):
        resume = ["--ckpt_path=last"] if epochs == 2 else []
        flags = [f"--trainer.max_epochs={epochs}", "--reversed_signal.picture_every_n_epochs=1", *resume]
        flags += ["--teacher_evaluation.problems=6"]
        assert cli_exit_code("fit", folder, *flags, "--trainer.check_val_every_n_epoch=1") == 0
    return folder / "last-digit" / "rlrt-0"


@pytest.mark.smoke
def test_a_run_arranges_its_charts_once_and_every_chart_has_metrics(resumed: Path) -> None:
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    log = event_log(resumed, "scalars", "tensors")
    (event,) = log.Tensors(CONFIG)
    found, logged = Layout(), log.Tags()["scalars"]
    found.ParseFromString(event.tensor_proto.string_val[0])
    assert [category.title[0] for category in found.category] == list("1234567")
    for category in found.category:
        for chart in category.chart:
            margins = [tag for s in chart.margin.series for tag in (s.lower, s.value, s.upper)]
            assert set(margins) <= set(logged), chart.title
            assert margins or any(re.match(tag, other) for tag in chart.multiline.tag for other in logged), chart.title
    (series,) = found.category[1].chart[-1].margin.series
    bounds = [f"intervals/eval/heldout/avg@8_{bound}" for bound in ("low", "high")]
    assert [series.value, series.lower, series.upper] == ["eval/heldout/avg@8", *bounds]
    low, value, high = (log.Scalars(tag)[-1].value for tag in (series.lower, series.value, series.upper))
    assert low < value < high


def test_a_run_describes_itself_once_for_the_page_hparams(resumed: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    log = event_log(resumed)
    data = HParamsPluginData.FromString(log.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    values = data.session_start_info.hparams
    assert values["method"].string_value == "RLRT"
    assert "lam=0.5" in values["settings"].string_value
    assert (values["settings.lam"].number_value, values["seed"].number_value) == (0.5, 0)
    assert values["lr"].number_value == pytest.approx(2e-4)
    data = HParamsPluginData.FromString(log.SummaryMetadata("_hparams_/experiment").plugin_data.content)
    assert [info.name.tag for info in data.experiment.metric_infos] == [*SCORES, *TEACHER, "rollout/reward"]
    written = [
        value.tag for path in resumed.glob("events.out.*") for event in load(path) for value in event.summary.value
    ]
    assert [written.count(f"_hparams_/{name}") for name in ("session_start_info", "experiment")] == [1, 1]
    assert "model.method.lam: 0.5" in (resumed / "hparams.yaml").read_text()


def test_tensorboard_has_no_curve_of_epochs(resumed: Path) -> None:
    groups = {tag.split("/")[0] for tag in event_log(resumed, "scalars").Tags()["scalars"]}
    assert "epoch" not in groups
    assert {"eval", "intervals", "rollout", "train"} <= groups


def test_the_pages_of_a_run_are_linked_from_the_first_epoch_on(resumed: Path) -> None:
    first, second = ((resumed / "signal" / f"epoch-{epoch}.html").read_text() for epoch in (1, 2))
    assert '<nav><a href="index.html">all epochs</a> · <a href="epoch-2.html">epoch 2 →</a></nav>' in first
    assert '<nav><a href="epoch-1.html">← epoch 1</a> · <a href="index.html">all epochs</a></nav>' in second
    index = (resumed / "signal" / "index.html").read_text()
    assert re.findall(r'href="(.+?)">RLRT, epoch (\d), training reward', index) == [
        ("epoch-1.html", "1"),
        ("epoch-2.html", "2"),
    ]


def test_pages_are_linked_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for epoch in (1, 11, 101, 21):
        page_path(tmp_path, epoch).write_text(f"<title>&lt;{epoch}&gt;</title><nav></nav>")
        link_pages(tmp_path, epoch)
    pages = {path.name: re.findall(r'href="(.+?)"', path.read_text()) for path in tmp_path.glob("*.html")}
    assert pages["epoch-21.html"] == ["epoch-11.html", "index.html", "epoch-101.html"]
    assert pages["epoch-11.html"] == ["epoch-1.html", "index.html", "epoch-21.html"]
    assert pages["epoch-101.html"] == ["epoch-21.html", "index.html"]
    assert pages["index.html"] == [f"epoch-{epoch}.html" for epoch in (1, 11, 21, 101)]
    assert "&lt;11&gt;" in (tmp_path / "index.html").read_text()


def test_the_layout_has_only_charts_of_logged_metrics_but_all_categories() -> None:
    found = layout(["rollout/reward", "labels/guess", "signal/asymmetry_wrong_p50"], SCORES[:2])
    assert list(found["1 reward"].values()) == [["Multiline", ["rollout/reward$"]]]
    assert list(found["3 rollouts"].values()) == [["Multiline", ["labels/.*$"]]]
    # TensorBoard shows margin charts in reverse order.
    assert list(found[EVALUATION]) == ["heldout/pass@8", "heldout/avg@8"]
    assert [tags for _, tags in found[SIGNAL].values()] == [
        [f"signal/asymmetry_wrong_p{q}" for q in ("50", "05", "95")]
    ]
    assert len(found) == 7
    assert not found["7 faults"]


def test_columns_are_the_same_for_every_method_and_the_main_ones_are_first() -> None:
    settings: dict[str, Any] = {
        "data.seed": 1,
        "data.task": "LastDigit",
        "model.optimizer.lr": 1e-3,
        "model.policy.path": "embedded",
        "teacher_refresh.every_n_epochs": 1,
    }
    grpo = columns({**settings, "model.method": "GRPO", "model.method.normalize_std": False})
    rlrt = columns({**settings, "model.method": "RLRT", "model.method.lam": 0.5, "model.method.gated": True})
    assert sorted(grpo)[:5] == sorted(rlrt)[:5] == ["lr", "method", "model", "seed", "settings"]
    assert grpo["settings"] == "normalize_std=False"
    assert rlrt["settings"] == "lam=0.5 gated=True"
    assert rlrt["settings.lam"] == 0.5


class Hopeless(RuleTask):
    """No completion is correct, so that nothing is trained on."""

    def __init__(self) -> None:
        super().__init__(lambda text: False)


def test_the_charts_include_metrics_that_begin_with_the_first_learning_signal(tmp_path: Path) -> None:
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    flags = [f"--data.task={__name__}.Hopeless", "--model.method=SDPO", "--data.rescore=true", *TRAIN_ONLY]
    assert cli_exit_code("fit", tmp_path, "--trainer.max_epochs=1", *flags) == 0
    (folder,) = runs_in(tmp_path)
    log, found = event_log(folder, "scalars", "tensors"), Layout()
    assert {"train/entropy", "train/kl", "train/divergence"}.isdisjoint(log.Tags()["scalars"]), "no learning signal"
    (event,) = log.Tensors(CONFIG)
    found.ParseFromString(event.tensor_proto.string_val[0])
    (train,) = [category for category in found.category if category.title[0] == "5"]
    charts = {chart.title: list(chart.multiline.tag) for chart in train.chart}
    assert charts["entropy (nats)"] == ["train/entropy$"]
    assert charts["KL (nats)"] == ["train/kl$", "train/divergence$"]
    assert charts["clipped tokens (share)"] == ["train/clip_fraction$"]
    assert charts["sampler against trainer (nats)"] == ["rollout/mismatch_(mean|max|kl)$"]
