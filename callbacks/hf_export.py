"""Exports the trained policy in Hugging Face format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.run_files import claim_path, occupied

from .model_card import model_card

if TYPE_CHECKING:
    from rlrt_lightning.module import RLRTModule


class HFExport(Callback):
    """Writes the policy and its tokenizer to a folder that transformers and vLLM can load, at the end of training, with
    a model card (README.md) that states base model, data, method, settings and the scores of the last evaluation.

    The weights have the dtype of `model.policy.dtype`, float32 by default. After training in bf16-mixed load them in
    bfloat16, in which the forward passes were computed: `from_pretrained(folder, dtype="bfloat16")`, `vllm serve
    folder --dtype bfloat16`. A finished run is exported by `fit --config <its config.yaml> --ckpt_path last
    --trainer.callbacks+=HFExport`, which trains nothing.

    Args:
        path: The folder, new or empty when training starts; null is `export` in the run's folder.
        adapter: Write only the adapters of `model.policy.lora`, in a format for peft and vLLM. Off merges them into the
            weights.
    """

    def __init__(self, path: str | None = None, adapter: bool = False) -> None:
        self.path = path
        self.adapter = adapter
        self._written = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks before training that there are adapters to write and that nothing would be overwritten."""
        if self.adapter and cast("RLRTModule", pl_module).policy.lora is None:
            raise ConfigError("HFExport.adapter is true, but model.policy.lora is not set: there are no adapters")
        if stage == "fit":
            folder = self._folder(trainer)
            if self.path and trainer.is_global_zero and occupied(folder) and not self._written:
                raise ConfigError(f"HFExport.path: {folder} already exists and would be overwritten; choose another")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the folder."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = self._folder(trainer)
        policy = cast("RLRTModule", pl_module).policy
        write = trainer.is_global_zero
        if self.adapter and policy.lora is not None:
            adapter = policy.lora.weights(policy.model)  # on every rank, because the weights may be sharded
            if write:
                policy.lora.write(adapter, folder, policy.path)
        else:
            weights = {}
            for name, tensor in policy.merged_weights():  # on every rank, because the weights may be sharded
                if write:
                    weights[name] = tensor.cpu()
            if policy.config.get_text_config().tie_word_embeddings:
                weights.pop("lm_head.weight", None)
            if write:
                policy.model.save_pretrained(folder, state_dict=weights)
        if write:
            policy.tokenizer.save_pretrained(folder)
            model_card(trainer, cast("RLRTModule", pl_module), self.adapter).save(folder / "README.md")
            rank_zero_info(f"exported the policy to {folder}")
        self._written = True

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.path) if self.path else claim_path(trainer, "export")
