"""What policy and sampler need of key-value caches, whichever kinds of layers an architecture has."""

from __future__ import annotations

import copy
import inspect
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


def cache_argument(model: PreTrainedModel, cache: Any) -> dict[str, Any]:
    """A key-value cache, by the name that the model's forward pass has for it."""
    return {_cache_name(cast(Any, type(model))): cache}


@lru_cache
def _cache_name(kind: type[PreTrainedModel]) -> str:
    """Renamed in later releases of transformers, which warn of the old name."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def copy_rows(cache: Cache, rows: Any) -> Cache:
    """A cache of its own that holds some rows of another, which stays as it is.

    Args:
        cache: A cache of G rows.
        rows: Which rows the copy has, in order and repeated as often as they are named, int64 [B].
    """
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in copied.layers:
        # Linear attention keeps its states in dictionaries, which would otherwise be shared with the original.
        vars(layer).update({name: dict(value) for name, value in vars(layer).items() if isinstance(value, dict)})
    copied.reorder_cache(rows)  # the one selection that every kind of layer has; it makes new tensors
    return copied
