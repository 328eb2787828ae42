"""The recipes are complete, and the paper's have its settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from rlrt_lightning.cli.commands import RLRTCli
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.tasks import DatasetTask
from tests.helpers.command_line import TRAIN_ONLY, ParsingCli, cli_exit_code, scalars
from tests.helpers.marks import slow_except
from tests.helpers.processes import ROOT
from tests.helpers.recipes import BOX, RECIPES, published

CONFIGS = ROOT / "configs"
RLRT_YAML = f"--config={CONFIGS / 'rlrt.yaml'}"


PAPER_SETS = {"aime24", "aime25", "aime26", "hmmt26", "amc23", "math500"}


@pytest.fixture(scope="module")
def cli() -> RLRTCli:
    return ParsingCli(["fit"])


@pytest.fixture
def resolved(cli: RLRTCli) -> Callable[..., dict[str, Any]]:
    """The settings that configs, given by their names, resolve to, as `--print_config` shows them."""

    def resolve(*names: str) -> dict[str, Any]:
        parsed = cli.parser.parse_args(["fit", *(f"--config={CONFIGS / name}.yaml" for name in names)])
        return cast("dict[str, Any]", yaml.safe_load(cli.parser.dump(parsed, skip_none=False))["fit"])

    return resolve


def class_name(spec: dict[str, Any]) -> str:
    return str(spec["class_path"].split(".")[-1])


def test_each_recipe_has_a_test() -> None:
    assert set(RECIPES) == {path.stem for path in (CONFIGS / "recipes").iterdir()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_complete_and_has_no_setting_of_the_embedded_task(name: str, resolved: Any) -> None:
    settings, expected = resolved(f"recipes/{name}"), RECIPES[name]
    for word in ("LastDigit", "embedded", "a correct solution: {context}. now answer:", "TransformersEngine"):
        assert word not in yaml.safe_dump(settings, width=10_000)
    model, data, trainer = settings["model"], settings["data"], settings["trainer"]
    assert class_name(model["method"]) == "RLRT"
    assert (model["method"]["init_args"]["lam"], model["method"]["init_args"]["eps_w"]) == (0.5, expected.eps_w)
    assert (model["policy"]["path"], model["policy"]["chat_kwargs"]) == (expected.path, expected.chat_kwargs)
    assert (class_name(model["optimizer"]), model["warmup_steps"]) == ("AdamW", 10)
    assert (model["optimizer"]["init_args"]["lr"], model["optimizer"]["init_args"]["weight_decay"]) == (1e-6, 0.0)
    assert (model["clip_low"], model["clip_high"], model["aggregation"]) == (0.2, 0.28, "token-mean")
    assert (model["importance"], model["importance_cap"], data["rescore"]) == ("token", 2.0, True)
    assert (class_name(data["task"]), class_name(data["engine"])) == ("DatasetTask", "VllmColocateEngine")
    assert set(data["benchmarks"]) == ({"gsm8k"} if name.startswith("gsm8k") else {"aime24"})
    assert (trainer["precision"], trainer["gradient_clip_val"], settings["seed_everything"]) == ("bf16-mixed", 1.0, 0)
    devices = (1, "auto") if name.startswith("gsm8k") else (8, "fsdp")
    assert (trainer["devices"], trainer["strategy"]) == devices


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("paper")])
def test_the_papers_recipes_have_its_settings(name: str, resolved: Any) -> None:
    settings = resolved(f"recipes/{name}")
    data = settings["data"]
    assert (data["prompts_per_epoch"], data["rollouts_per_prompt"], data["minibatches"]) == (256, 8, 2)
    assert (data["sampling"]["temperature"], data["sampling"]["max_new_tokens"]) == (1.0, 20480)
    assert (data["max_prompt_tokens"], settings["trainer"]["max_epochs"]) == (2048, 100)
    assert settings["model"]["policy"]["gradient_checkpointing"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_demonstrations_are_limited_only_by_the_models_positions(name: str, resolved: Any) -> None:
    settings, own = resolved(f"recipes/{name}"), RECIPES[name].positions
    data, limit = settings["data"], settings["model"]["policy"]["max_positions"]
    assert settings["model"]["teacher"]["max_context_tokens"] is None
    positions = own if limit is None else limit
    assert positions <= own
    prompt, response = data["max_prompt_tokens"], data["sampling"]["max_new_tokens"]
    spare = positions - prompt - response
    if own > 32768:  # thinking, which is most of a long response, is cut out of demonstrations of Qwen3-8B
        assert spare >= (response if name != "paper-qwen3-8b" else 16384)
    else:
        assert spare >= 8192


@pytest.mark.parametrize("name", slow_except(RECIPES, "paper-qwen3-4b-base", "gsm8k-qwen3-0.6b"))
def test_the_papers_evaluation_sets_can_be_added_to_a_recipe(name: str, resolved: Any) -> None:
    alone, layered = resolved(f"recipes/{name}"), resolved(f"recipes/{name}", "evaluation/paper")
    assert set(layered["data"]["benchmarks"]) == PAPER_SETS
    assert layered["data"].pop("eval_prompts") == 16
    for settings in (alone, layered):
        settings["data"].pop("benchmarks")
        settings["data"].pop("eval_prompts", None)
    assert layered == alone


@pytest.mark.parametrize("name", ["rlrt", "rlrt_all", "rlrt_contrast"])
def test_rlrts_configs_keep_the_recipes_clip_range(name: str, resolved: Any) -> None:
    """It depends on the model; other classes have their own."""
    for recipe in ("gsm8k-qwen3-0.6b", "paper-qwen3-4b-instruct"):
        method = resolved(f"recipes/{recipe}", f"methods/{name}")["model"]["method"]
        assert (class_name(method), method["init_args"]["eps_w"]) == ("RLRT", RECIPES[recipe].eps_w)
    assert resolved("rlrt", f"methods/{name}")["model"]["method"]["init_args"]["eps_w"] == 1.0


def test_smollm2_resolves_to_the_same_settings_with_and_without_the_embedded_tasks_config(resolved: Any) -> None:
    assert resolved("models/smollm2") == resolved("rlrt", "models/smollm2")


# -- data as published ---------------------------------------------------------------------------------------------

QUESTION = "Find $x$.\n\nThe last line of the figure is $AB$. Answer: the shaded region."


def task_of(settings: dict[str, Any], train: Path, rows: list[dict[str, Any]]) -> DatasetTask:
    """The task of resolved settings, with rows of its own."""
    train.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DatasetTask(**{**settings["data"]["task"]["init_args"], "train": str(train), "heldout": None})


@pytest.mark.parametrize("text", [published(QUESTION), f"{QUESTION}\n{BOX}", QUESTION])
def test_the_papers_prompts_ask_once_for_a_box_in_every_copy_of_the_data(
    text: str, resolved: Any, tmp_path: Path
) -> None:
    truth = {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"}
    prompts = [text, [{"role": "user", "content": text}]]
    rows = [{"prompt": p, "reward_model": truth} for p in prompts]
    task = task_of(resolved("recipes/paper-qwen3-4b-base"), tmp_path / "dapo.jsonl", rows)
    plain, chat = task.problems("train")
    assert plain.prompt == f"{QUESTION}\n\n{BOX}"
    assert chat.prompt == [{"role": "user", "content": plain.prompt}]
    assert task.verify(plain, "So \\boxed{34}").correct
    assert not task.verify(plain, "So \\boxed{43}").correct


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("gsm8k")])
def test_gsm8ks_answers_are_read_from_its_solutions(name: str, resolved: Any, tmp_path: Path) -> None:
    steps = "He has 2*620=<<2*620=1240>>1240 eggs."
    rows = [{"question": "How many eggs?", "answer": f"{steps}\n#### {end}"} for end in ("1,240", "-3", "0.5")]
    settings = resolved(f"recipes/{name}")
    assert settings["data"]["task"]["init_args"]["answer_pattern"] == "####(.*)"
    task = task_of(settings, tmp_path / "gsm8k.jsonl", rows)
    for problem, right, wrong in zip(task.problems("train"), ("1240", "-3", "1/2"), ("620", "3", "5"), strict=True):
        assert problem.prompt == f"How many eggs?\n\n{BOX}"
        assert problem.solution is not None
        assert problem.solution.startswith(steps)
        assert "####" not in problem.answer_text
        assert task.verify(problem, f"\\boxed{{{right}}}").correct
        assert not task.verify(problem, f"\\boxed{{{wrong}}}").correct


@pytest.mark.parametrize("name", slow_except(RECIPES, "paper-qwen3-4b-base", "gsm8k-qwen3-0.6b"))
def test_own_data_replaces_a_recipes_data_and_keeps_its_other_settings(
    name: str, resolved: Any, tmp_path: Path
) -> None:
    recipe, own = resolved(f"recipes/{name}"), resolved(f"recipes/{name}", "own_data")
    task = own["data"]["task"]["init_args"]
    kept = {"prompt_template": recipe["data"]["task"]["init_args"]["prompt_template"]}
    assert task == {k: p.default for k, p in signature(DatasetTask).parameters.items()} | kept
    with pytest.raises(ConfigError, match="needs `train`, `heldout` or both"):
        DatasetTask(**task)
    assert own["data"]["benchmarks"] == {"heldout": {"task": None, "samples": 4, "limit": 200, "sampling": None}}
    task |= {"prompt": "text", "answer": "label"}
    rows = [{"text": "1+3?", "label": "4"}, {"text": "1+4?", "label": 5}]
    assert [p.answer_text for p in task_of(own, tmp_path / "own.jsonl", rows).problems("train")] == ["4", "5"]
    for settings in (recipe, own):
        del settings["data"]["task"], settings["data"]["benchmarks"]
    assert own == recipe


# -- other configs -------------------------------------------------------------------------------------------------


def test_no_config_overrides_the_methods_teacher() -> None:
    for path in CONFIGS.glob("**/*.yaml"):
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
    before, after = (f"--config={CONFIGS / 'methods' / name}.yaml" for name in (first, last))
    layered, alone = (cli.parser.parse_args(["fit", RLRT_YAML, *flags]).fit for flags in ((before, after), (after,)))
    assert layered.model.method == alone.model.method
    assert (
        vars(layered.teacher_refresh) == vars(alone.teacher_refresh) == {"every_n_epochs": "method", "ema_decay": None}
    )


LOSSES: dict[str, dict[str, Any]] = {
    "gspo": {"ratio": "sequence", "aggregation": "seq-mean-token-mean", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"surrogate": "cispo", "clip_high": 4.0},
    "dr_grpo": {"aggregation": "constant-length", "length": None},
    "dapo": {"clip_high": 0.28, "aggregation": "token-mean", "mask_truncated": True},
}


def test_each_loss_config_is_tested() -> None:
    assert set(LOSSES) == {path.stem for path in (CONFIGS / "losses").iterdir()}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_config_can_be_added_to_a_recipe_and_keeps_its_method(name: str, resolved: Any) -> None:
    recipe = "recipes/paper-qwen3-4b-base"
    alone, layered = resolved(recipe), resolved(recipe, f"losses/{name}")
    assert LOSSES[name].items() <= layered["model"].items()
    assert layered["model"]["method"] == alone["model"]["method"]
    assert layered["data"].pop("sampling_rounds") == (10 if name == "dapo" else 1)
    alone["data"].pop("sampling_rounds")
    assert layered["data"] == alone["data"]


@pytest.mark.parametrize("name", slow_except(LOSSES, "dapo"))
def test_each_loss_config_trains_the_embedded_task(name: str, tmp_path: Path) -> None:
    flags = ("--trainer.max_epochs=1", *TRAIN_ONLY, "--trainer.enable_checkpointing=false")
    assert cli_exit_code("fit", tmp_path, *flags, configs=(f"configs/losses/{name}.yaml",)) == 0
    curves = scalars(tmp_path)
    assert curves["train/grad_norm"][0][1] > 0
    assert ("groups/rounds" in curves) == (name == "dapo")


@pytest.mark.parametrize("name", ["paper", "local"])
def test_evaluation_configs_replace_the_default_evaluation_sets(name: str, resolved: Any) -> None:
    benchmarks = resolved("rlrt", f"evaluation/{name}")["data"]["benchmarks"]
    assert set(benchmarks) == (PAPER_SETS if name == "paper" else PAPER_SETS - {"aime26", "hmmt26"})
    for benchmark in benchmarks.values():
        assert benchmark["samples"] == 16
        assert benchmark["task"]["init_args"]["heldout"]
    if name == "paper":
        assert len({benchmark["task"]["init_args"]["heldout"] for benchmark in benchmarks.values()}) == 6
        assert {b["task"]["init_args"]["prompt"] for b in benchmarks.values()} == {"problem", "question"}
        assert all("boxed" in b["task"]["init_args"]["prompt_template"] for b in benchmarks.values())
