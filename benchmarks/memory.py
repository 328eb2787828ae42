"""Memory per GPU for each strategy: a formula for any model, and its check against two CPU processes.

python benchmarks/memory.py                     # the table for the recipes' models
python benchmarks/memory.py --recipes           # the estimates in the recipes
python benchmarks/memory.py --check             # formula and measurement for a model of 250 M weights in float32
python benchmarks/memory.py --loading           # the peak of each rank's host memory while it loads the weights
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock, patch

import torch
from common import memory_of_process

from rlrt_lightning.policy import memory

GB = 10**9
FP32, BF16 = memory.FP32, 2

QWEN3 = {
    "0.6B": (1024, 3072, 28, 16),
    "1.7B": (2048, 6144, 28, 16),
    "4B": (2560, 9728, 36, 32),
    "8B": (4096, 12288, 36, 32),
}
"""Hidden size, intermediate size, layers and attention heads, from the models' config.json."""


@dataclass(frozen=True)
class Model:
    """Numbers of weights of a model.

    Args:
        name: Name of the model.
        weights: Total number of weights.
        layer: Weights of one decoder layer.
        layers: Number of decoder layers.
        adapters: Weights of rank-16 LoRA adapters in all linear layers except the head.
    """

    name: str
    weights: int
    layer: int
    layers: int
    adapters: int

    @classmethod
    def of(cls, name: str, config: Any) -> Model:
        """Counts the weights of a model configuration."""
        from transformers import AutoModelForCausalLM

        from rlrt_lightning.policy.sharding import decoder_layers

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layers = decoder_layers(model)
        linear = [m for layer in layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
        return cls(
            name,
            sum(p.numel() for p in model.parameters()),
            sum(p.numel() for p in layers[0].parameters()),
            len(layers),
            16 * sum(m.in_features + m.out_features for m in linear),
        )


def held(model: Model, strategy: str, ranks: int, teacher: str, lora: bool, base: int = FP32) -> float:
    """Bytes that a rank holds during training, without activations: weights, gradients, Adam's two moments and the
    teacher's own weights. With adapters each frozen weight takes `base` bytes."""
    trained = FP32 * (model.adapters if lora else model.weights)
    parts = memory.held(trained, base * model.weights if lora else 0, buckets=strategy == "ddp")
    parts["gradients"] = trained
    parts["teacher"] = trained if teacher == "own" else 0  # a copy of the trained weights; the rest is shared
    return sum(parts.values()) / (ranks if strategy == "fsdp2" else 1)


def fetched(model: Model, strategy: str, base: int) -> float:
    """Bytes of gathered weights at any time under bf16-mixed: embeddings, head and norm with `base` bytes per weight,
    the current layer and the next one in bfloat16."""
    outside = model.weights - model.layers * model.layer
    return memory.gathered(base * outside, BF16 * model.layer) if strategy == "fsdp2" else 0.0


def qwen3(size: str) -> Any:
    """The configuration of a Qwen3 model."""
    from transformers import Qwen3Config

    hidden, inner, layers, heads = QWEN3[size]
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=size != "8B",
    )


def table(ranks: int) -> str:
    """The table in docs/strategies.md."""
    models = [Model.of(f"Qwen3-{size}", qwen3(size)) for size in QWEN3]
    lines = [
        "| strategy | trained | teacher's weights | " + " | ".join(f"{m.name}, GB" for m in models) + " |",
        "| --- | --- | --- | " + " | ".join("---:" for _ in models) + " |",
    ]
    names = {"one GPU": "one GPU", "ddp": "`ddp`", "fsdp2": f"`fsdp2`, {ranks} GPUs"}
    for strategy, where in names.items():
        for lora in (False, True):
            for teacher in ("policy's", "own"):
                sizes = []
                for model in models:
                    kind = "own" if teacher == "own" else "policy"
                    gathered = fetched(model, strategy, BF16 if lora else FP32)
                    total = held(model, strategy, ranks, kind, lora, BF16) + gathered
                    sizes.append(f"{total / GB:.1f}")
                trained = "adapters (bf16 base)" if lora else "all, float32"
                lines.append(f"| {where} | {trained} | {teacher} | {' | '.join(sizes)} |")
    return "\n".join(lines)


# -- the recipes ---------------------------------------------------------------------------------------------------


class RecipeMemory(NamedTuple):
    """Memory of a GPU that trains a recipe, in bytes, as `MemoryEstimate` estimates it at the start of a run.

    Args:
        gpu: The GPU's memory, from the first line of the recipe.
        tokens: Padded tokens of the largest training pass.
        held: Weights and the optimizer's state.
        training: What the gradients and the largest training pass need besides.
        rollouts: What vLLM needs besides during rollouts.
    """

    gpu: float
    tokens: int
    held: float
    training: float
    rollouts: float

    @property
    def peak(self) -> float:
        """The most that exists at the same time."""
        return self.held + max(self.training, self.rollouts)

    @classmethod
    def of(cls, path: Path) -> RecipeMemory:
        """Estimates the memory of a recipe for a Qwen3 model."""
        from transformers import AutoModelForCausalLM

        policy, data, trainer = (section(path, name) for name in ("model", "data", "trainer"))
        policy = policy["policy"]
        config = qwen3(re.findall(r"[\d.]+B", policy["path"])[0])
        with torch.device("meta"):
            loaded = AutoModelForCausalLM.from_config(config)
        model, sharded = Model.of(path.stem, config), trainer.get("strategy") == "fsdp"
        ranks, residual = (trainer["devices"], BF16) if sharded else (1, FP32)
        weights = FP32 * model.weights / ranks  # as large as the gradients
        tokens = data["tokens_per_pass"]
        parts = memory.training_pass(
            memory.Shape.of(loaded),
            tokens,
            length=data["max_prompt_tokens"] + data["sampling"]["max_new_tokens"],
            chunk=min(1024, tokens),  # the default of model.policy.logits_chunk
            residual=residual,
            computed=BF16,
            checkpointing=policy.get("gradient_checkpointing", False),
        )
        copies = fetched(model, "fsdp2", FP32) if sharded else memory.cast_weights(loaded, BF16)
        gpu = GB * float(re.findall(r"of (\d+) GB", path.read_text(encoding="utf-8"))[0])
        return cls(
            gpu,
            tokens,
            sum(memory.held(weights).values()),
            weights + sum(parts.values()) + copies,
            gpu * data["engine"]["init_args"]["memory"],
        )


def section(recipe: Path, name: str) -> Any:
    """A section of a recipe, which may be a file of its own."""
    import yaml

    found = yaml.safe_load(recipe.read_text(encoding="utf-8"))[name]
    return yaml.safe_load((recipe.parent / found).read_text(encoding="utf-8")) if isinstance(found, str) else found


def recipes_table() -> str:
    """The table of the recipes."""
    lines = [
        "| recipe | GPU, GB | tokens of a pass | held, GB | training pass, GB | vLLM, GB | peak, GB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for path in sorted((Path(__file__).parents[1] / "configs/recipes").glob("*.yaml")):
        found = RecipeMemory.of(path)
        sizes = (found.held, found.training, found.rollouts, found.peak)
        row = " | ".join(f"{size / GB:.1f}" for size in sizes)
        lines.append(f"| `{path.stem}` | {found.gpu / GB:.0f} | {found.tokens:,} | {row} |")
    return "\n".join(lines)


# -- the check -----------------------------------------------------------------------------------------------------


def one_rank(strategy: str, teacher: str, lora: bool, folder: Path) -> None:
    """Trains for two steps and prints the increase in memory, in bytes."""
    from lightning import Callback, Trainer

    from rlrt_lightning import RLRT, RLRTModule, RolloutDataModule, Sampling
    from rlrt_lightning.callbacks import TeacherRefresh
    from rlrt_lightning.policy.lora import LoRA
    from rlrt_lightning.policy.model import Policy
    from rlrt_lightning.policy.sharding import FSDP2Strategy
    from rlrt_lightning.tasks.last_digit import TEACHER_TEMPLATE
    from rlrt_lightning.teacher import Teacher

    seen: dict[str, int] = {}

    class Measure(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            seen["before"] = memory_of_process("VmRSS")

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen["held"] = memory_of_process("VmRSS") - seen["before"]  # kept from the second step, with Adam's moments

    refresh = TeacherRefresh(ema_decay=0.5) if teacher == "own" else TeacherRefresh()
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=FSDP2Strategy() if strategy == "fsdp2" else strategy,
        max_epochs=1,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        callbacks=[Measure(), refresh],
    )
    module = RLRTModule(
        Policy(str(folder), lora=LoRA() if lora else None),
        Teacher(TEACHER_TEMPLATE),
        method=RLRT(context="answer", success_threshold=-1.0),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-6),
    )
    sampling = Sampling(max_new_tokens=2)
    data = RolloutDataModule(sampling=sampling, prompts_per_epoch=4, rollouts_per_prompt=2, minibatches=2)
    trainer.fit(module, datamodule=data)
    print(json.dumps({"rank": trainer.global_rank, "held": seen["held"]}), flush=True)


def save_model(
    folder: Path, layers: int = 15, vocabulary: int = 57, file_size: str = "5GB", dtype: torch.dtype = torch.float32
) -> Model:
    """Writes a random model with the embedded tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from rlrt_lightning.policy.model import EMBEDDED

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, max_shard_size=file_size)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)
    return Model.of("", config)


def check() -> str:
    """The table of formula and measurement."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_model(folder)
        lines = [
            f"{model.weights / 1e6:.0f} M weights, two ranks, GB per rank",
            "| strategy | trained | teacher's weights | formula | measured |",
            "| --- | --- | --- | ---: | ---: |",
        ]
        for strategy in ("ddp", "fsdp2"):
            for lora in (False, True):
                for teacher in ("policy", "own"):
                    formula = held(model, strategy, 2, teacher, lora)
                    words = ["--rank", strategy, teacher, str(int(lora)), str(folder)]
                    measured = max(rank["held"] for rank in launch(2, words))
                    trained = "adapters" if lora else "all"
                    lines.append(f"| {strategy} | {trained} | {teacher} | {formula / GB:.2f} | {measured / GB:.2f} |")
                    print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


# -- loading -------------------------------------------------------------------------------------------------------


def load_one(way: str, folder: Path) -> None:
    """Loads a sharded policy and prints the increase of the peak, in bytes."""
    from lightning import LightningModule, Trainer
    from transformers import AutoModelForCausalLM

    from rlrt_lightning.policy import model
    from rlrt_lightning.policy.loading import NeedsTransformers
    from rlrt_lightning.policy.sharding import FSDP2Strategy

    def adopt(policy: Any, loaded: Any, **_: Any) -> None:
        policy.model = loaded  # without the checks of the architecture: on CPUs they would gather into host memory

    ranks = int(os.environ["WORLD_SIZE"])
    trainer: Any = Trainer(accelerator="cpu", devices=ranks, strategy=FSDP2Strategy(), logger=False)
    trainer.strategy.connect(LightningModule())
    trainer.strategy.setup_environment()
    policy: Any = model.Policy(str(folder))
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(policy.config)  # imports the model's code, which is no part of the loading
    # Raises an exception instead of finding the files, so that transformers loads the model.
    files = model.tensor_files if way == "shards" else Mock(side_effect=NeedsTransformers("the whole model is loaded"))
    before = memory_of_process("VmHWM")  # includes pages of mapped files
    with patch.object(model.Policy, "adopt", adopt), patch.object(model, "tensor_files", files):
        policy.load(trainer.strategy)
    if way == "whole":
        trainer.strategy.shard(policy.model)
    print(json.dumps({"peak": memory_of_process("VmHWM") - before}), flush=True)


def loading() -> str:
    """The table of the peaks while loading."""
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), 32768
        model = save_model(folder, layers=8, vocabulary=rows, file_size="200MB", dtype=torch.bfloat16)
        lines = [
            f"{model.weights / 1e6:.0f} M weights, bfloat16 in the files and float32 in memory; the largest tensor has "
            f"{FP32 * 1024 * rows / 1e6:.0f} MB; median and range of all ranks of three runs",
            "| ranks | reads | whole model, MB | its shards, MB | peak, MB |",
            "| --- | --- | ---: | ---: | ---: |",
        ]
        for ranks in (2, 4):
            for way in ("whole", "shards"):
                runs = [launch(ranks, ["--load", way, str(folder)]) for _ in range(3)]
                seen = [rank["peak"] / 1e6 for run in runs for rank in run]
                size = FP32 * model.weights / 1e6
                measured = f"{statistics.median(seen):.0f} ({min(seen):.0f} to {max(seen):.0f})"
                lines.append(f"| {ranks} | {way} | {size:.0f} | {size / ranks:.0f} | {measured} |")
                print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def launch(count: int, words: list[str]) -> list[dict[str, int]]:
    """Starts ranks with the arguments `words`, and returns what each one measured, in bytes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "TORCHELASTIC_RUN_ID": "memory",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "MALLOC_MMAP_THRESHOLD_": "65536",  # freed memory returns to the system, so that RSS is the memory in use
        "CUDA_VISIBLE_DEVICES": "",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *words],
            env={**env, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for r in range(count)
    ]
    outputs = [rank.communicate(timeout=600)[0].decode().strip().splitlines() for rank in ranks]
    return [json.loads(lines[-1]) for lines in outputs]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the formula with two CPU processes")
    parser.add_argument("--recipes", action="store_true", help="the estimate of each recipe")
    parser.add_argument("--loading", action="store_true", help="measure the peak while the weights are loaded")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs in the fsdp2 rows of the table")
    parser.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.rank:
        strategy, teacher, lora, folder = words.rank
        one_rank(strategy, teacher, bool(int(lora)), Path(folder))
    elif words.load:
        load_one(words.load[0], Path(words.load[1]))
    elif words.recipes:
        print(recipes_table())
    elif words.loading:
        print(loading())
    else:
        print(check() if words.check else table(words.gpus))


if __name__ == "__main__":
    main()
