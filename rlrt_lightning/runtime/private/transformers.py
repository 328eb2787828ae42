"""Private names of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def kept_in_float32(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `from_pretrained` keeps some weights in float32 when it loads the model in another dtype.

    Only these attributes of the model's classes say so, and `from_config` ignores them.
    """
    names: Any = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return dtype != torch.float32 and any(getattr(module, name, None) for module in model.modules() for name in names)
