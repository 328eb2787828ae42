"""The trained policy as an ordinary Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rlrt_lightning.runtime.errors import ConfigError
from rlrt_lightning.runtime.run_files import claim_path, occupied

if TYPE_CHECKING:
    from rlrt_lightning.module import RLRTModule


class HFExport(Callback):
    """Writes the policy and its tokenizer, when training ends, into a folder that transformers and vLLM load.

    Args:
        path: The folder; null is `export` in the run's folder. It has to be new or empty when training begins.
        adapter: Write the adapters of `model.policy.lora` alone, as a folder for peft and vLLM; off merges them into
            the weights.
    """

    def __init__(self, path: str | None = None, adapter: bool = False) -> None:
        self.path = path
        self.adapter = adapter
        self._written = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that there are adapters to write, and that nothing is overwritten, before training."""
        if self.adapter and cast("RLRTModule", pl_module).policy.lora is None:
            raise ConfigError("HFExport.adapter is true, but model.policy.lora is not set: there are no adapters")
        if stage == "fit":
            folder = self._folder(trainer)
            if self.path and trainer.is_global_zero and occupied(folder) and not self._written:
                raise ConfigError(f"HFExport.path: {folder} is there already and would be overwritten; name another")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the folder."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = self._folder(trainer)
        policy = cast("RLRTModule", pl_module).policy
        write = trainer.is_global_zero
        if self.adapter and policy.lora is not None:
            policy.lora.save(policy.model, folder, policy.path, write)
        else:
            weights = {}
            for name, tensor in policy.merged_weights():  # on every rank, since each may have a part only
                if write:
                    weights[name] = tensor.cpu()
            if policy.config.get_text_config().tie_word_embeddings:
                weights.pop("lm_head.weight", None)
            if write:
                policy.model.save_pretrained(folder, state_dict=weights)
        if write:
            policy.tokenizer.save_pretrained(folder)
            rank_zero_info(f"exported the policy to {folder}")
        self._written = True

    def _folder(self, trainer: Trainer) -> Path:
        return Path(self.path) if self.path else claim_path(trainer, "export")
