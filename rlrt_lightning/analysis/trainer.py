"""Additional commands of the command line: the instruments that generate rollouts, and the vLLM server."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch import nn

from rlrt_lightning.analysis.plots import prepare_folder
from rlrt_lightning.analysis.reflection import Reflection
from rlrt_lightning.analysis.shift import Shift
from rlrt_lightning.datamodule import RolloutDataModule
from rlrt_lightning.module import RLRTModule
from rlrt_lightning.rollouts.vllm_common import require_vllm
from rlrt_lightning.rollouts.vllm_serve import server_command, server_environment
from rlrt_lightning.rollouts.vllm_server import VllmServerEngine
from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.files import PLOTS, RUNS
from rlrt_lightning.runtime.precision import half_precision
from rlrt_lightning.runtime.run_files import run_of


class InstrumentTrainer(Trainer):
    """Lightning's trainer with `reflection`, `shift` and `serve`."""

    # `--help` shows the first line of the docstrings. Lightning's describe its own use of data.

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Trains the policy."""
        super().fit(*args, **kwargs)

    def validate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates a checkpoint, or the initial weights, on the evaluation sets."""
        return super().validate(*args, **kwargs)

    def test(self, *args: Any, **kwargs: Any) -> Any:
        """Does the same as `validate`, under Lightning's other name."""
        return super().test(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Does the same as `validate`, and returns the rollouts in Python."""
        return super().predict(*args, **kwargs)

    def reflection(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        out: str | None = None,
        benchmark: str = "heldout",
        limit: int | None = None,
        samples: int = 8,
        text: str = "Wait, let me reconsider.",
        context: Literal["sibling", "solution", "answer"] = "sibling",
        per_problem: int = 2,
        continuations: int = 4,
    ) -> None:
        """Reflection injection (Fig. 6): where does it help to reconsider?

        Responses are cut at the position where policy and teacher differ most, where they differ least, and at a random
        one; a text is inserted and the policy continues. Writes reflection.csv, reflection_summary.csv, reflection.png
        and reflection.svg.

        Args:
            model: The module.
            datamodule: The data module.
            ckpt_path: Checkpoint of the policy; null uses the initial weights.
            out: Output folder; null is a new one in `plots` in the folder of the checkpoint's run.
            benchmark: Name of the evaluation set.
            limit: Use only the first `limit` problems.
            samples: Number of rollouts per problem. A problem is hard if at most a quarter of them are correct, and
                easy if five eighths to seven eighths are.
            text: Inserted text. Inserting nothing is always included as the control; empty runs only the control.
            context: Context of the teacher; rollouts without a context are skipped.
            per_problem: Maximum number of wrong rollouts per hard problem and of correct rollouts per easy problem.
            continuations: Number of continuations from each position.
        """
        module, data, _ = self._attach(model, datamodule, ckpt_path)
        instrument = Reflection(samples, text, context, per_problem, continuations)
        self._run_instrument(instrument, module, data, benchmark, limit, out, ckpt_path)

    def shift(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        out: str | None = None,
        benchmark: str = "heldout",
        limit: int | None = None,
        samples: int = 2,
    ) -> None:
        """Distribution shift (Fig. 7): how much training has changed the policy.

        Compares the trained policy with its initial model at each position. Writes shift.parquet, shift_summary.csv,
        shift.png and shift.svg.

        Args:
            model: The module.
            datamodule: The data module.
            ckpt_path: Checkpoint of the trained policy. The initial model is `model.policy.path`.
            out: Output folder; null is a new one in `plots` in the folder of the checkpoint's run.
            benchmark: Name of the evaluation set.
            limit: Use only the first `limit` problems.
            samples: Number of rollouts per problem.
        """
        if ckpt_path is None:
            raise ConfigError("shift compares a trained policy with its initial model: set --ckpt_path")
        module, data, base = self._attach(model, datamodule, ckpt_path)
        self._run_instrument(Shift(samples, base), module, data, benchmark, limit, out, ckpt_path)

    def serve(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        host: str = "127.0.0.1",
        port: int = 8000,
        flags: list[str] | None = None,
    ) -> None:
        """Starts a vLLM server for the policy with the flags that the config's engine needs, and runs until it exits.

        Args:
            model: The module.
            datamodule: The data module, with a VllmServerEngine.
            host: Address to listen on. Anyone who can reach it can change the weights: use loopback or a trusted
                network only.
            port: Port to listen on.
            flags: Additional flags of vLLM, such as ["--tensor-parallel-size", "2"].
        """
        engine, module = cast(RolloutDataModule, datamodule).engine, cast(RLRTModule, model)
        if not isinstance(engine, VllmServerEngine):
            raise ConfigError("serve needs data.engine=VllmServerEngine, and the config has another engine")
        require_vllm("serve")
        engine.half = half_precision(self)
        # vLLM replaces this process, so that signals and the exit code are its own.
        scores = module.teacher.scored_by == "engine"
        command = server_command(module.policy, engine, host, port, flags or [], scores)
        os.execve(sys.executable, command, server_environment())

    def _attach(
        self, model: LightningModule, datamodule: LightningDataModule, ckpt_path: str | None
    ) -> tuple[RLRTModule, RolloutDataModule, nn.Module]:
        """Sets up model and data as for an evaluation.

        Returns:
            The module, the data module, and a module whose `model` has the initial weights.
        """
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

    def _run_instrument(
        self,
        instrument: Reflection | Shift,
        module: RLRTModule,
        data: RolloutDataModule,
        benchmark: str,
        limit: int | None,
        out: str | None,
        ckpt_path: str | None,
    ) -> None:
        if benchmark not in data.benchmarks:
            raise ConfigError(f"benchmark is {benchmark}; it has to be one of {', '.join(data.benchmarks)}")
        folder = Path(out) if out else (run_of(ckpt_path) or RUNS) / PLOTS
        folder = prepare_folder(folder, type(instrument).__name__.lower(), new=out is None)
        try:
            for path in instrument(module, data, benchmark, limit, folder):
                print("wrote", path)
        finally:
            data.teardown("validate")
