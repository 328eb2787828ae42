"""Helpers for key-value caches that work with every kind of layer, shared by the policy and the sampler."""

from __future__ import annotations

import copy
import inspect
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


def cache_argument(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """A key-value cache as the keyword argument of the model's `forward`."""
    return {_cache_name(cast(Any, type(model))): cache}


@lru_cache
def _cache_name(kind: type[PreTrainedModel]) -> str:
    """Later releases of transformers renamed the argument and warn about the old name."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def copy_rows(cache: Cache, rows: Any) -> Cache:
    """Copies selected rows of a cache into a new cache; the original is unchanged.

    Args:
        cache: A cache of G rows.
        rows: Indices of the rows to copy, in order and possibly repeated, int64 [B].
    """
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in copied.layers:
        # Linear attention stores its states in dictionaries, which `copy.copy` shares with the original.
        vars(layer).update({name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)})
    copied.reorder_cache(rows)  # the only selection that all kinds of layers implement; it allocates new tensors
    return copied
