"""The paper's configs have the paper's settings, and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlrt_lightning.__main__ import main
from rlrt_lightning.cli.commands import RLRTCli
from tests.helpers.command_line import ParsingCli
from tests.helpers.processes import ROOT
from tests.helpers.tiny import tiny_policy

RLRT_YAML = f"--config={ROOT / 'configs' / 'rlrt.yaml'}"


@pytest.fixture
def resolved(capsys: pytest.CaptureFixture[str]) -> Any:
    """The settings that a command line resolves to."""

    def run(*flags: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as stopped:
            main(["fit", RLRT_YAML, *flags, "--print_config"])
        assert stopped.value.code in (0, None)
        return yaml.safe_load(capsys.readouterr().out)

    return run


def method(settings: dict[str, Any]) -> tuple[str, float | None, float | None]:
    spec = settings["model"]["method"]
    init = spec.get("init_args", {})
    return spec["class_path"].split(".")[-1], init.get("lam"), init.get("eps_w")


@pytest.mark.parametrize(
    ("name", "path", "eps_w"),
    [
        ("qwen3-4b-base", "Qwen/Qwen3-4B-Base", 1.0),
        ("qwen3-8b-base", "Qwen/Qwen3-8B-Base", 1.0),
        ("qwen3-4b-instruct", "Qwen/Qwen3-4B-Instruct-2507", 0.5),
        ("qwen3-8b", "Qwen/Qwen3-8B", 0.2),
    ],
)
def test_model_configs_have_the_papers_settings(name: str, path: str, eps_w: float, resolved: Any) -> None:
    settings = resolved(f"--config={ROOT / 'configs' / 'models' / name}.yaml")
    assert method(settings) == ("RLRT", 0.5, eps_w)
    model, data = settings["model"], settings["data"]
    assert model["policy"]["path"] == path
    assert (model["optimizer"]["init_args"]["lr"], model["warmup_steps"]) == (1e-6, 10)
    assert (model["clip_low"], model["clip_high"], model["aggregation"]) == (0.2, 0.28, "token-mean")
    assert (data["prompts_per_epoch"], data["rollouts_per_prompt"], data["minibatches"]) == (256, 8, 2)
    assert (data["sampling"]["temperature"], data["sampling"]["max_new_tokens"]) == (1.0, 20480)
    assert data["benchmarks"] == {"heldout": {"task": None, "samples": 16, "limit": None, "sampling": None}}
    assert (data["max_prompt_tokens"], settings["trainer"]["max_epochs"]) == (2048, 100)


@pytest.mark.filterwarnings("ignore:.*prompts of data.* are longer")
def test_the_papers_config_runs_on_a_tiny_random_model(tmp_path: Path, shared: Path) -> None:
    small = tiny_policy("qwen3")
    small.model.save_pretrained(tmp_path / "model")
    small.tokenizer.save_pretrained(tmp_path / "model")
    flags = [
        f"--config={ROOT / 'configs' / 'models' / 'qwen3-4b-base.yaml'}",
        f"--model.policy.path={tmp_path / 'model'}",
        f"--data.task.train={shared / 'data' / 'dapo_math_512.parquet'}",
        f"--data.task.heldout={shared / 'data' / 'aime24.parquet'}",
        "--data.prompts_per_epoch=4",
        "--data.rollouts_per_prompt=2",
        "--data.sampling.max_new_tokens=4",
        "--data.benchmarks={heldout: {samples: 2, limit: 2}}",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false",
        f"--trainer.logger.save_dir={tmp_path}",
    ]
    # Most prompts are longer than the 128 positions of the tiny model, and are dropped.
    assert main(["fit", RLRT_YAML, *flags]) == 0


@pytest.fixture(scope="module")
def cli() -> RLRTCli:
    return ParsingCli(["fit"])


def test_no_config_overrides_the_methods_teacher() -> None:
    for path in (ROOT / "configs").glob("**/*.yaml"):
        assert "teacher_refresh" not in yaml.safe_load(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ("sdpo", "grpo"),
        pytest.param("rlsd", "sdpo", marks=pytest.mark.slow),
        pytest.param("sdpo", "rlsd", marks=pytest.mark.slow),
        ("rlrt_all", "rlrt"),
        pytest.param("teacher_predicted", "rlsd", marks=pytest.mark.slow),
        ("rlsd", "teacher_predicted"),
    ],
)
def test_a_later_method_config_fully_replaces_an_earlier_one(first: str, last: str, cli: RLRTCli) -> None:
    before, after = (f"--config={ROOT / 'configs' / 'methods' / name}.yaml" for name in (first, last))
    layered, alone = (cli.parser.parse_args(["fit", RLRT_YAML, *flags]).fit for flags in ((before, after), (after,)))
    assert layered.model.method == alone.model.method
    assert (
        vars(layered.teacher_refresh) == vars(alone.teacher_refresh) == {"every_n_epochs": "method", "ema_decay": None}
    )


@pytest.mark.parametrize("name", ["paper", "local"])
def test_evaluation_configs_replace_the_default_evaluation_sets(name: str, resolved: Any) -> None:
    benchmarks = resolved(f"--config={ROOT / 'configs' / 'evaluation' / name}.yaml")["data"]["benchmarks"]
    paper = {"aime24", "aime25", "aime26", "hmmt26", "amc23", "math500"}
    assert set(benchmarks) == (paper if name == "paper" else paper - {"aime26", "hmmt26"})
    for benchmark in benchmarks.values():
        assert benchmark["samples"] == 16
        assert benchmark["task"]["init_args"]["heldout"]
    if name == "paper":
        assert len({benchmark["task"]["init_args"]["heldout"] for benchmark in benchmarks.values()}) == 6
        assert {b["task"]["init_args"]["prompt"] for b in benchmarks.values()} == {"problem", "question"}
        assert all("boxed" in b["task"]["init_args"]["prompt_template"] for b in benchmarks.values())
