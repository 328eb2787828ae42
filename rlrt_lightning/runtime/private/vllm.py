"""Private names of vLLM."""

from __future__ import annotations

import logging

RELOADING = "vllm.model_executor.model_loader.reload.layerwise"
"""The logger of the code that loads new weights into a running engine."""


def mute_rotary_warning() -> None:
    """Suppresses the warning "RotaryEmbedding: Failed to load weights" of every sync: the tables of rotary embeddings
    are computed, so no checkpoint contains them, and vLLM keeps those it has. If the logger has another name, the
    warning is back, and nothing else changes."""
    logging.getLogger(RELOADING).addFilter(_not_of_rotary_tables)


def _not_of_rotary_tables(record: logging.LogRecord) -> bool:
    return "RotaryEmbedding: Failed to load weights" not in record.getMessage()
