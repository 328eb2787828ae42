"""The trained policy as an ordinary Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from rlrt_lightning.callbacks.boards import run_folder

if TYPE_CHECKING:
    from rlrt_lightning.module import RLRTModule


class HFExport(Callback):
    """Writes the policy and its tokenizer, when training ends, into a folder that transformers and vLLM load.

    Args:
        path: The folder; null is `export` in the run's folder. What it holds of an earlier export is overwritten.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the folder."""
        folder = Path(self.path) if self.path else run_folder(trainer) / "export"
        policy = cast("RLRTModule", pl_module).policy
        if trainer.is_global_zero:
            policy.model.save_pretrained(folder, state_dict=dict(policy.merged_weights()))
            policy.tokenizer.save_pretrained(folder)
            rank_zero_info(f"exported the policy to {folder}")
