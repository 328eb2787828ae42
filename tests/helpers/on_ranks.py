"""Runs that tests/runtime/test_strategies.py compares, on one process or several:

torchrun --nproc-per-node 2 -m tests.helpers.on_ranks ddp FOLDER RUN...

Each run writes what it recorded to FOLDER/RUN.pt. With `command_line`, the other arguments are a command line."""

from __future__ import annotations

import os
import signal
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safetensors
import torch
from lightning import Callback, Trainer

from rlrt_lightning import RLRT, LastDigit, RLRTModule, RolloutDataModule, Sampling
from rlrt_lightning.__main__ import main as command_line
from rlrt_lightning.callbacks import Evaluation, HFExport, RankGuard, ReversedSignalLogger, SafeStop, TeacherRefresh
from rlrt_lightning.callbacks.memory_estimate import estimate
from rlrt_lightning.datamodule import Benchmark
from rlrt_lightning.objective import RLCSD, SRPO, AntiSD
from rlrt_lightning.policy import model
from rlrt_lightning.policy.loading import NeedsTransformers
from rlrt_lightning.policy.lora import LoRA
from rlrt_lightning.policy.model import Policy
from rlrt_lightning.policy.sharding import FSDP2Strategy, local, whole
from rlrt_lightning.rollouts import TransformersEngine
from rlrt_lightning.runtime.ranks import gather
from rlrt_lightning.tasks import Problem, Verdict
from rlrt_lightning.tasks.last_digit import TEACHER_TEMPLATE
from rlrt_lightning.teacher import Teacher


class Recorder(Callback):
    """The rollouts, metrics and passes per optimizer step of each epoch, the gradients of each step, and the final
    weights."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {name: [] for name in ("gradients", "metrics", "passes", "rollouts", "teacher")}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.policy.model.named_parameters()
        self.seen["gradients"].append({n: whole(p.grad).clone() for n, p in named if p.grad is not None})

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.seen["rollouts"]:
            self._record_metrics(trainer)
        epoch = trainer.datamodule.epoch
        self.seen["rollouts"].append([(r.prompt_ids, r.response_ids) for r in epoch.rollouts])
        self.seen["passes"].append(trainer.accumulate_grad_batches)
        self.seen["teacher"].append(
            [(r.response_ids, s.logp) for r, s in zip(epoch.rollouts, epoch.teacher, strict=True) if s is not None]
        )
        self.seen["shape"] = [str(p.shape) for p in pl_module.policy.parameters() if p.requires_grad]
        self.seen["held"] = gather(sum(local(p).numel() for p in pl_module.parameters()))
        estimated = estimate(trainer, pl_module, trainer.datamodule, None)
        self.seen["estimated"] = gather({**estimated.held, **estimated.phases["training pass"]})
        self.seen["read"] = gather(list(READ))
        self.seen["shards"] = gather([local(p).numel() for p in pl_module.policy.parameters()])

    def _record_metrics(self, trainer: Any) -> None:
        """Records the previous epoch's metrics, which the module logs after the callbacks' `on_train_epoch_end`."""
        self.seen["metrics"].append({t: float(v) for t, v in trainer.callback_metrics.items()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._record_metrics(trainer)
        self.seen["weights"] = {n: whole(p.detach()).clone() for n, p in pl_module.policy.model.named_parameters()}


READ: list[int] = []
"""Number of elements of each slice that this rank read from a safetensors file, in the current run."""


class Observed:
    """Records the slices that are read from a file opened by `safetensors.safe_open`."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.file = OPEN(*args, **settings)

    def __enter__(self) -> Any:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def keys(self) -> Any:
        return self.file.keys()

    def get_slice(self, name: str) -> Any:
        found = self.file.get_slice(name)

        class Slice:
            get_shape = found.get_shape

            def __getitem__(self, rows: Any) -> Any:
                READ.append(found[rows].numel())
                return found[rows]

        return Slice()


OPEN = safetensors.safe_open
safetensors.safe_open = Observed  # not the name that transformers has imported


def loads_whole(*_: Any) -> None:
    """Replaces `tensor_files`, so that each rank loads the whole model."""
    raise NeedsTransformers("a test compares the two ways of loading")


class LongBesideShort(LastDigit):
    """Every fourth prompt is three times as long; about half of the completions are correct, whatever the prompt."""

    def problems(self, split: Any) -> Any:
        found = super().problems(split)[:32]
        return [replace(p, prompt=" ".join([str(p.prompt)] * (1 if i % 4 else 3))) for i, p in enumerate(found)]

    def verify(self, problem: Problem, completion: str) -> Verdict:
        even = zlib.crc32(completion.encode()) % 2 == 0
        return Verdict(float(even), even)


class OnlyEvenSolvable(LongBesideShort):
    """Every second problem has no correct answer, so one of two ranks has nothing to learn from."""

    def verify(self, problem: Problem, completion: str) -> Verdict:
        solvable = int(problem.id.rpartition("-")[2]) % 2 == 0
        return super().verify(problem, completion) if solvable else Verdict(0.0, False)


class Harder(LastDigit):
    """Leaves out problems of which a rollout was correct."""

    def __init__(self) -> None:
        super().__init__()
        self.solved: list[str] = []

    def observe(self, problems: Any, rewards: Any) -> None:
        self.solved += [p.id for p, r in zip(problems, rewards, strict=True) if max(r) == 1]

    def admits(self, problem: Problem) -> bool:
        return problem.id not in self.solved


class Unshuffled(RolloutDataModule):
    def _row(self, position: int) -> int:
        return position


class FailsOnRank1(Callback):
    """Fails on the second rank in the second epoch.

    Args:
        how: raises, stopped or killed.
    """

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 1 and trainer.current_epoch == 1:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            raise ValueError("the disk of the second rank is on fire")


class SigtermOnRank1(Callback):
    """Sends SIGTERM to the second rank during the first micro-batch of the second epoch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.global_rank, trainer.current_epoch, batch_idx) == (1, 1, 0):
            os.kill(os.getpid(), signal.SIGTERM)


def run(strategy: str, folder: Path, name: str, epochs: int = 2, **changes: Any) -> dict[str, Any]:
    """Trains, and returns what was recorded; `changes` are the settings that are popped below."""
    READ.clear()
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    sharding = changes.pop("sharding", {})
    if strategy == "hybrid":
        sharding = {"dp_shard_size": 2, **sharding}
    sharded = FSDP2Strategy(**sharding)
    chosen: Any = {"fsdp2": sharded, "hybrid": sharded, "one": "auto"}.get(strategy, strategy)
    recorder = Recorder()
    callbacks = [TeacherRefresh(**changes.pop("refresh", {})), Evaluation(table=0), RankGuard(timeout_s=10), recorder]
    callbacks.append(ReversedSignalLogger(picture_every_n_epochs=0))
    callbacks += changes.pop("callbacks", [])
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=chosen,
        max_epochs=epochs,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        limit_val_batches=changes.pop("limit_val_batches", 0),
        num_sanity_val_steps=0,
        accumulate_grad_batches=changes.pop("accumulate", 2),
        gradient_clip_val=0.5,
        precision=changes.pop("precision", "32-true"),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder / name,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=changes.get("save", False),
    )
    lora = LoRA(rank=4, targets=["q_proj", "down_proj"]) if changes.pop("lora", False) else None
    path = str(folder / "half") if changes.pop("half", False) else "embedded"
    torch.manual_seed(0)
    module = RLRTModule(
        Policy(
            path,
            changes.pop("dtype", "float32"),
            lora=lora,
            gradient_checkpointing=changes.pop("gradient_checkpointing", False),
        ),
        Teacher(TEACHER_TEMPLATE, rest_on_cpu=changes.pop("rest_on_cpu", False)),
        method=changes.pop("method", RLRT()),
        # With a small eps, a weight whose gradient is only rounding error would take as large a step as any other.
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, eps=1e-3, weight_decay=0.0),
        warmup_steps=0,
        **changes.pop("model", {}),
    )
    data = changes.pop("data", RolloutDataModule)(
        task=changes.pop("task", None),
        engine=TransformersEngine(dtype=changes.pop("engine_dtype", None)),
        sampling=Sampling(max_new_tokens=changes.pop("max_new_tokens", 32)),
        prompts_per_epoch=8,
        rollouts_per_prompt=4,
        tokens_per_pass=changes.pop("tokens_per_pass", None),
        sampling_rounds=changes.pop("sampling_rounds", 1),
        overlong_buffer=changes.pop("overlong_buffer", None),
        benchmarks={"heldout": Benchmark(samples=2, limit=5)},
        eval_prompts=2,
    )
    save, resume = changes.pop("save", False), changes.pop("resume", None)
    assert not changes, f"unknown changes: {list(changes)}"
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    if save:
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    if trainer.is_global_zero:
        torch.save(recorder.seen, folder / f"{name}.pt")
    return recorder.seen


RUNS: dict[str, dict[str, Any]] = {
    "plain": {"limit_val_batches": 1.0},
    "lora": {"lora": True, "refresh": {"ema_decay": 0.5}},
    "lora_frozen": {"lora": True, "refresh": {"every_n_epochs": None}},
    "ema": {"refresh": {"ema_decay": 0.5}, "rest_on_cpu": True},
    "copied": {"engine_dtype": "float32", "gradient_checkpointing": True, "epochs": 1},
    "srpo": {"method": SRPO(context="answer", normalize_std=True), "epochs": 1},
    "antisd": {"method": AntiSD(warmup_steps=1, close_at=1.0), "task": LongBesideShort()},
    "rlcsd": {"method": RLCSD(beta=1.0, tau=0.5, eta=0.5), "task": LongBesideShort()},
    "one_sided": {"task": OnlyEvenSolvable(), "data": Unshuffled},
    "one_pass": {"task": LongBesideShort(), "accumulate": 1},
    "passes": {"task": LongBesideShort(), "accumulate": 1, "tokens_per_pass": 150},
    "gathered": {"sharding": {"reshard_after_forward": False}},
    "bf16": {"precision": "bf16-mixed", "epochs": 1, "half": True},
    "bf16_true": {"precision": "bf16-true", "epochs": 1, "lora": True},
    "half_base": {"precision": "bf16-mixed", "epochs": 1, "lora": True, "dtype": "bfloat16"},
    "rounds": {
        "model": {"reference_kl": 0.1, "aggregation": "constant-length", "mask_truncated": True},
        "task": Harder(),
        "sampling_rounds": 4,
        "overlong_buffer": 4,
        "max_new_tokens": 10,
    },
    "gspo": {
        "model": {"ratio": "sequence", "aggregation": "seq-mean-token-mean", "reference_kl": 0.1},
        "rest_on_cpu": True,
        "epochs": 1,
    },
    "cispo": {"model": {"surrogate": "cispo", "reference_kl": 0.1}, "lora": True},
    "saved": {"epochs": 1, "save": True, "refresh": {"ema_decay": 0.5}},
    "saved_whole": {
        "epochs": 1,
        "save": True,
        "refresh": {"ema_decay": 0.5},
        "sharding": {"save_distributed_checkpoint": False},
    },
    "stops": {"save": True, "refresh": {"ema_decay": 0.5}, "callbacks": [SafeStop(), SigtermOnRank1()]},
    "fails": {"callbacks": [FailsOnRank1("raises")], "epochs": 3},
    "hangs": {"callbacks": [FailsOnRank1("stopped")], "epochs": 3},
    "dies": {"callbacks": [FailsOnRank1("killed")], "epochs": 3},
}


def main(args: list[str]) -> None:
    if args[0] == "command_line":
        sys.exit(command_line(args[1:]))
    strategy, folder, *names = args
    for name in names:
        if name.endswith("_loaded_whole"):
            with patch.object(model, "tensor_files", loads_whole):
                run(strategy, Path(folder), name, **RUNS[name.removesuffix("_loaded_whole")])
        elif name == "plain":
            run(strategy, Path(folder), name, **RUNS[name], callbacks=[HFExport(str(Path(folder) / "exported"))])
        elif name == "exported_adapter":
            export = HFExport(str(Path(folder) / name), adapter=True)
            run(strategy, Path(folder), name, epochs=1, lora=True, callbacks=[export])
        elif name.startswith("resumed:"):  # resumed:NAME:CHECKPOINT
            _, new, checkpoint = name.split(":")
            run(strategy, Path(folder), new, epochs=2, resume=checkpoint, refresh={"ema_decay": 0.5})
        else:
            run(strategy, Path(folder), name, **RUNS[name])


if __name__ == "__main__":
    main(sys.argv[1:])
