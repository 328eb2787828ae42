"""Further commands of the command line beside `fit`: the instruments that draw rollouts, and the vLLM server."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch import nn

from rlrt_lightning.analysis.figures import fresh
from rlrt_lightning.analysis.reflection import Reflection
from rlrt_lightning.analysis.shift import Shift
from rlrt_lightning.datamodule import RolloutDataModule
from rlrt_lightning.module import RLRTModule
from rlrt_lightning.rollouts.vllm_common import require_vllm
from rlrt_lightning.rollouts.vllm_server import VllmServerEngine, server_command, server_environment
from rlrt_lightning.runtime.errors import ConfigError


class InstrumentTrainer(Trainer):
    """Lightning's trainer with `reflection`, `shift` and `serve`."""

    def reflection(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        out: str = "figures",
        benchmark: str = "heldout",
        limit: int | None = None,
        samples: int = 8,
        text: str = "Wait, let me reconsider.",
        context: Literal["sibling", "solution", "answer"] = "sibling",
        per_problem: int = 2,
        continuations: int = 4,
    ) -> None:
        """Reflection injection (Fig. 6): where does it help to reconsider?

        Responses are cut where policy and teacher differ most, least, or anywhere, and the policy goes on. Writes
        reflection.csv, reflection_summary.csv, reflection.png and reflection.svg.

        Args:
            model: The module.
            datamodule: The data module.
            ckpt_path: Checkpoint whose policy is looked at; null takes the initial weights.
            out: Folder to write to.
            benchmark: Name of the benchmark whose problems are taken.
            limit: Take the first so many of its problems.
            samples: Rollouts of each problem. Hard problems are those with up to a quarter of them right, easy ones
                those with five eighths to seven eighths.
            text: What is put in. Empty: the policy goes on from there anew, which is the control in any case.
            context: What the teacher sees; rollouts without a context are left out.
            per_problem: Wrong rollouts of each hard problem, and right ones of each easy one, at most.
            continuations: How often the policy goes on from each place.
        """
        module, data, _ = self._attach(model, datamodule, ckpt_path)
        instrument = Reflection(samples, text, context, per_problem, continuations)
        self._look(instrument, module, data, benchmark, limit, out)

    def shift(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        out: str = "figures",
        benchmark: str = "heldout",
        limit: int | None = None,
        samples: int = 2,
    ) -> None:
        """Distribution shift (Fig. 7): how far training has moved the policy.

        Compares it with the model that it began with, position by position. Writes shift.parquet, shift_summary.csv,
        shift.png and shift.svg.

        Args:
            model: The module.
            datamodule: The data module.
            ckpt_path: Checkpoint of the trained policy; what it began with is `model.policy.path`.
            out: Folder to write to.
            benchmark: Name of the benchmark whose problems are taken.
            limit: Take the first so many of its problems.
            samples: Rollouts of each problem.
        """
        if ckpt_path is None:
            raise ConfigError("shift compares a trained policy with the model that it began with: give --ckpt_path")
        module, data, base = self._attach(model, datamodule, ckpt_path)
        self._look(Shift(samples, base), module, data, benchmark, limit, out)

    def serve(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        host: str = "127.0.0.1",
        port: int = 8000,
        flags: list[str] | None = None,
    ) -> None:
        """Starts a vLLM server for the policy, with what the engine of the config needs, and stays until it ends.

        Args:
            model: The module.
            datamodule: The data module, with a VllmServerEngine.
            host: Address to listen at. Whoever reaches it can change the weights: loopback or a trusted network only.
            port: Port to listen at.
            flags: Further flags of vLLM, such as ["--tensor-parallel-size", "2"].
        """
        engine, policy = cast(RolloutDataModule, datamodule).engine, cast(RLRTModule, model).policy
        if not isinstance(engine, VllmServerEngine):
            raise ConfigError("serve starts a server for data.engine=VllmServerEngine; the config has another engine")
        require_vllm("serve")
        # A process in place of this one: signals and exit code are vLLM's own.
        os.execve(sys.executable, server_command(policy, engine, host, port, flags or []), server_environment())

    def _attach(
        self, model: LightningModule, datamodule: LightningDataModule, ckpt_path: str | None
    ) -> tuple[RLRTModule, RolloutDataModule, nn.Module]:
        """Model and data as in an evaluation, and the initial weights in a module's `model`."""
        if self.world_size > 1:
            raise ConfigError("the instruments run on one device: set --trainer.devices=1")
        module, data = cast(RLRTModule, model), cast(RolloutDataModule, datamodule)
        untyped = cast(Any, self)
        untyped.strategy.connect(module)
        data.trainer = module.trainer = self
        untyped.datamodule = data
        data.setup("validate")
        module.policy.load()
        module.to(untyped.strategy.root_device)
        base = nn.Module()
        base.model = copy.deepcopy(module.policy.model).eval().requires_grad_(False)
        if ckpt_path is not None:
            state = torch.load(ckpt_path, map_location="cpu", weights_only=True)["state_dict"]
            own = {name: value for name, value in state.items() if name.startswith("policy.")}
            module.load_state_dict(own)
        return module, data, base

    def _look(
        self,
        instrument: Reflection | Shift,
        module: RLRTModule,
        data: RolloutDataModule,
        benchmark: str,
        limit: int | None,
        out: str,
    ) -> None:
        if benchmark not in data.benchmarks:
            raise ConfigError(f"there is no benchmark {benchmark}; there are {', '.join(data.benchmarks)}")
        folder = fresh(Path(out), type(instrument).__name__.lower())
        try:
            for path in instrument(module, data, benchmark, limit, folder):
                print("wrote", path)
        finally:
            data.teardown("validate")
