"""Every recipe runs from start to end with real vLLM on the CPU and a stand-in for its weights: a tiny random Qwen3
model with a byte-level tokenizer, Qwen's chat template and thinking tags, and a few rows of the data's schema."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from rlrt_lightning.__main__ import main
from tests.helpers.byte_model import CHATML
from tests.helpers.command_line import scalars
from tests.helpers.marks import slow_except
from tests.helpers.processes import ROOT
from tests.helpers.recipes import BOX, RECIPES, published
from tests.helpers.tiny import END, byte_level_tokenizer

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (tests/install_vllm_cpu.sh)"
    ),
    pytest.mark.filterwarnings("default"),  # vLLM emits many warnings
]

SWITCHED = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}",
)
"""Qwen3's template: without thinking the response begins after an empty block."""
BOXES = [r"\boxed{1}", r"\boxed{2}"]
"""Single tokens of the stand-in, so that its random responses are sometimes right."""


def left(i: int) -> int:
    """The answer to question i."""
    return 1 + i % 2


def question(i: int) -> str:
    return f"Ann has {i + 2} apples and eats all but {left(i)} of them.\nHow many are left?"


def save_stand_in(folder: Path, recipe: str) -> str:
    """Saves a random model in place of the recipe's, and returns its path."""
    tokenizer = byte_level_tokenizer(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>", "</think>", *BOXES])
    tokenizer.pad_token = END
    if not recipe.endswith("-base"):
        tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHATML if recipe.endswith("-instruct") else SWITCHED
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 7,  # padded, as in the real models
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=RECIPES[recipe].positions,
        tie_word_embeddings="8b" not in recipe,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3ForCausalLM(config)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)}
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends))
    model.save_pretrained(folder)
    return str(folder)


def gsm8k(i: int) -> dict[str, Any]:
    eaten = f"{i + 2}-{left(i)}=<<{i + 2}-{left(i)}={i + 2 - left(i)}>>{i + 2 - left(i)}"
    return {"question": question(i), "answer": f"She eats {eaten} apples.\n#### {left(i)}"}


def verl(prompt: Any, i: int) -> dict[str, Any]:
    truth = {"ground_truth": str(left(i)), "style": "rule-lighteval/MATH_v2"}
    return {"data_source": "math_dapo", "prompt": prompt, "ability": "MATH", "reward_model": truth, "extra_info": {}}


def dapo(i: int) -> dict[str, Any]:
    """A row of DAPO-Math-17k as published."""
    return verl([{"role": "user", "content": published(question(i))}], i)


def processed(i: int) -> dict[str, Any]:
    """A row of its copy without duplicates, with the question alone."""
    original = dapo(i)
    return {**original, "prompt": question(i), "solution": str(left(i)), "source_prompt": original["prompt"]}


def boxed(i: int) -> dict[str, Any]:
    """A row of a copy that asks for a box."""
    return verl([{"role": "user", "content": f"{question(i)}\n{BOX}"}], i)


def competition(column: str) -> Callable[[int], dict[str, Any]]:
    return lambda i: {column: question(i), "answer": str(left(i)), "solution": "Count."}


def save(folder: Path, name: str, row: Callable[[int], dict[str, Any]], n: int = 8) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(n)))
    return str(path)


def data_flags(folder: Path, recipe: str) -> list[str]:
    if recipe.startswith("gsm8k"):
        train, heldout = (save(folder, name, gsm8k) for name in ("train", "test"))
        return [f"--data.task.train={train}", f"--data.task.heldout={heldout}", "--data.benchmarks.gsm8k.limit=4"]
    layout = {"paper-qwen3-4b-base": dapo, "paper-qwen3-8b": boxed}.get(recipe, processed)
    aime = save(folder, "aime24", competition("problem"))
    return [
        f"--data.task.train={save(folder, 'train', layout)}",
        f"--data.benchmarks.aime24.task.heldout={aime}",
        "--data.benchmarks.aime24.limit=2",
    ]


def paper_evaluation(folder: Path) -> list[str]:
    """Flags for the paper's six evaluation sets, with rows of their schemas."""
    flags = [f"--config={ROOT / 'configs' / 'evaluation' / 'paper.yaml'}"]
    for name in ("aime24", "aime25", "aime26", "hmmt26", "amc23", "math500"):
        path = save(folder, name, competition("question" if name == "amc23" else "problem"), n=1)
        flags += [
            f"--data.benchmarks.{name}.task.heldout={path}",
            f"--data.benchmarks.{name}.sampling.max_new_tokens=8",
        ]
    return flags


@pytest.mark.parametrize("recipe", slow_except(RECIPES, "gsm8k-qwen3-0.6b"))
def test_a_recipe_trains_and_evaluates(recipe: str, tmp_path: Path) -> None:
    flags = [
        f"--config={ROOT / 'configs' / 'recipes' / recipe}.yaml",
        f"--model.policy.path={save_stand_in(tmp_path / 'model', recipe)}",
        *data_flags(tmp_path, recipe),
        "--data.prompts_per_epoch=8",
        "--data.sampling.max_new_tokens=64",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--data.tokens_per_pass=3072",
        "--trainer.max_epochs=2",
        "--trainer.check_val_every_n_epoch=2",
        "--trainer.enable_progress_bar=false",
        f"--trainer.logger.save_dir={tmp_path / 'runs'}",
    ]
    assert main(["fit", *flags]) == 0
    curves = {tag: [value for _, value in curve] for tag, curve in scalars(tmp_path / "runs").items()}
    assert len(curves["rollout/correct"]) == 2
    assert max(curves["rollout/correct"]) > 0
    assert max(curves["groups/mixed"]) > 0
    assert max(curves["signal/context"]) > 0, "the teacher scores rollouts with a demonstration"
    assert max(curves["train/grad_norm"]) > 0
    assert all(0 < value < 0.1 for value in curves["rollout/mismatch_mean"]), "sampler and trainer round differently"
    assert max(curves["faults/rollouts"] + curves["faults/skipped_steps"] + curves["rollout/faults"]) == 0
    name = "gsm8k" if recipe.startswith("gsm8k") else "aime24"
    samples = 4 if name == "gsm8k" else 16
    assert len(curves[f"eval/{name}/avg@{samples}"]) == 2, "before training and after two epochs"

    results = tmp_path / "results"
    evaluated = paper_evaluation(tmp_path) if name == "aime24" else []
    assert main(["validate", *flags, *evaluated, "--ckpt_path=last", f"--evaluation.results={results}"]) == 0
    assert len(list(results.glob("*.jsonl"))) == (6 if evaluated else 1)
    prompt = str(json.loads((results / f"{name}.jsonl").read_text().splitlines()[0])["prompt"])
    assert prompt.count(r"within \boxed{}") == 1
