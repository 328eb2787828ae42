"""Shared by the benchmarks: a task, measured epochs, alternating turns, and the limits of the hardware."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Metrics = dict[str, float]


def question(number: int) -> str:
    return f"What is {3 + number} + {7 * number % 13}? Explain it in a few sentences."


def ask(model: str, number: int) -> str:
    """A question in the format of the model."""
    from rlrt_lightning.tasks import last_digit

    if model != "embedded":
        return question(number)
    return last_digit.question([number % 10, number // 10 % 10, number % 7, 1])


def right(completion: str) -> bool:
    """A checksum of the text; True for about half of all completions."""
    return sum(map(ord, completion)) % 2 == 0


def memory_of_process(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    return 1024 * int(re.findall(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """Writes a Qwen3 model with random weights, and a tokenizer of the words w1, w2, ... with the same vocabulary size.

    Args:
        folder: The model's folder.
        shape: Values of `Qwen3Config`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = {"<end>": 0, **{f"w{i}": i for i in range(1, shape["vocab_size"])}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        Qwen3ForCausalLM(Qwen3Config(**shape)).save_pretrained(folder)


def trl_trainer(
    model: Any,
    tokenizer: Any,
    prompts: list[Any],
    reward: Callable[..., list[float]],
    folder: str,
    rollouts: int,
    tokens: int,
    callbacks: Sequence[Any] = (),
    **settings: Any,
) -> Any:
    """TRL's `GRPOTrainer`, with the objective that ours has.

    Args:
        model: The model.
        tokenizer: Its tokenizer, with a padding token.
        prompts: Prompts, as texts or conversations.
        reward: The reward function.
        folder: Folder for TRL's files.
        rollouts: Rollouts per prompt.
        tokens: Maximum response length.
        callbacks: Callbacks of the trainer.
        settings: Further settings of `GRPOConfig`.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    defaults: dict[str, Any] = {
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "loss_type": "dapo",
        "epsilon_high": 0.28,
    }
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=folder,
            num_generations=rollouts,
            max_completion_length=tokens,
            **{**defaults, **settings},
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def epochs_of_ours(
    model: str,
    method: Any,
    prompts: int,
    rollouts: int,
    tokens: int,
    epochs: int,
    dtype: str = "float32",
    micro_batches: int = 1,
    fixed_length: bool = False,
    learning_rate: float = 1e-6,
    precision: str = "32-true",
) -> list[Metrics]:
    """Runs epochs of one optimizer step each. The first epoch is a warm-up and is left out.

    Args:
        model: Folder or id of the model, or `embedded`.
        method: The method.
        prompts: Problems per epoch.
        rollouts: Rollouts per problem.
        tokens: Maximum response length.
        epochs: Number of measured epochs.
        dtype: Type of the weights.
        micro_batches: Micro-batches per optimizer step.
        fixed_length: No token ends a response, so that all responses have the maximum length.
        learning_rate: 0 keeps the rollouts the same for all methods.
        precision: Precision of the trainer. With bf16-mixed a bfloat16 copy generates the rollouts, and the trainer
            rescores them.

    Returns:
        For each epoch its `seconds` and the metrics `time/`, `speed/` and `rollout/` that every run logs.
    """
    from lightning import Callback, Trainer

    from rlrt_lightning import Policy, Problem, RLRTModule, RolloutDataModule, Sampling, Task, Teacher, Verdict
    from rlrt_lightning.callbacks import TeacherRefresh
    from rlrt_lightning.rollouts import TransformersEngine
    from rlrt_lightning.tasks.last_digit import TEACHER_TEMPLATE

    class Parity(Task):
        isolated = False

        def problems(self, split: str) -> list[Problem]:
            return [Problem(str(i), ask(model, i)) for i in range(prompts)]

        def verify(self, problem: Problem, completion: str) -> Verdict:
            return Verdict(float(right(completion)), right(completion))

    class Clock(Callback):
        def __init__(self) -> None:
            self.last, self.epochs = 0.0, list[Metrics]()

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            now = time.perf_counter()
            logged = {tag: float(value) for tag, value in trainer.callback_metrics.items()}
            kept = {tag: value for tag, value in logged.items() if tag.startswith(("time/", "speed/", "rollout/"))}
            self.epochs.append({"seconds": now - self.last, **kept})
            self.last = now

    mixed = precision == "bf16-mixed"
    policy = Policy(path=model, dtype=dtype)  # type: ignore[arg-type]
    if fixed_length:
        policy.end_tokens = [-1]
    template = TEACHER_TEMPLATE if model == "embedded" else None
    module = RLRTModule(
        policy=policy,
        teacher=Teacher(template),
        method=method,
        optimizer=lambda p: torch.optim.AdamW(p, lr=learning_rate, weight_decay=0.0),
        warmup_steps=0,
    )
    data = RolloutDataModule(
        task=Parity(),
        engine=TransformersEngine(dtype="bfloat16" if mixed else None),
        rescore=mixed,
        sampling=Sampling(max_new_tokens=tokens),
        prompts_per_epoch=prompts,
        rollouts_per_prompt=rollouts,
        minibatches=1,
        benchmarks={},
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            max_epochs=epochs + 1,
            accelerator="cpu" if not torch.cuda.is_available() else "gpu",
            devices=1,
            callbacks=[TeacherRefresh(), clock],
            reload_dataloaders_every_n_epochs=1,
            precision=precision,
            accumulate_grad_batches=micro_batches,
            gradient_clip_val=1.0,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        ).fit(module, datamodule=data)
    return clock.epochs[1:]


def epoch_parser(doc: str | None, option: str, variants: Sequence[str]) -> argparse.ArgumentParser:
    """Options of a script that measures epochs of our training for each variant, in turns.

    Args:
        doc: The script's description.
        option: The hidden option that selects a variant (`in_turns`).
        variants: Values of the option.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="folder or id of the model (default: embedded)")
    parser.add_argument("--tokens", type=int, default=64, help="maximum response length")
    parser.add_argument("--micro-batches", type=int, default=2, help="micro-batches per optimizer step")
    parser.add_argument("--epochs", type=int, default=2, help="measured epochs per turn")
    parser.add_argument("--turns", type=int, default=3, help=f"number of measurements of each {option}")
    parser.add_argument("--out", help="JSON file for all measurements")
    parser.add_argument(f"--{option}", choices=variants, help=argparse.SUPPRESS)
    return parser


def in_turns(variants: Sequence[str], turns: int, option: str) -> dict[str, list[Any]]:
    """Runs the current script in a new process for each variant, in turns (A B C A B C ...).

    Args:
        variants: Values of the option.
        turns: Number of turns.
        option: The script's option that selects a variant.

    Returns:
        The last line that each process printed, parsed as JSON: a list over the turns for each variant.
    """
    found: dict[str, list[Any]] = {variant: [] for variant in variants}
    for turn in range(turns):
        for variant in variants:
            command = [sys.executable, *sys.argv, f"--{option}={variant}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{variant}: {done.stderr[-3000:]}")
            found[variant].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"turn {turn + 1}, {variant}: done", file=sys.stderr, flush=True)
    return found


def cell(values: Sequence[float], digits: int = 2) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratios(values: Sequence[float], baseline: Sequence[float]) -> str:
    """Median and range of the ratio to the baseline within each turn."""
    return cell([a / b for a, b in zip(values, baseline, strict=True)])


def save(path: str | None, found: Any) -> None:
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(found, indent=1))


def peak_flops(dtype: torch.dtype = torch.float32, seconds: float = 3.0) -> float:
    """Peak FLOP/s of matrix products, over a few sizes."""
    best = 0.0
    for rows, inner, columns in ((2048, 2048, 2048), (1024, 576, 1536), (1024, 1536, 576), (4096, 1024, 4096)):
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        until = time.perf_counter() + seconds / 4
        while time.perf_counter() < until:
            start = time.perf_counter()
            torch.matmul(a, b.T, out=out)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - start))
    return best


def peak_bandwidth(seconds: float = 2.0) -> float:
    """Peak memory bandwidth for reading, in bytes per second."""
    numbers, best = torch.zeros(2**28), 0.0
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.numel() * 4 / (time.perf_counter() - start))
    return best


def matmul_weights(model: Any) -> tuple[int, int]:
    """Number of weights that each token is multiplied with in the decoder, and in the head."""
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    return body - (0 if model.config.tie_word_embeddings else head), head
