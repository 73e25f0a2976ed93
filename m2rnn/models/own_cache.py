"""Caches that other libraries make: an empty one becomes this library's."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache

from m2rnn.models.cache import M2RNNCache


def own_cache(cache: Any, num_layers: int) -> M2RNNCache | None:
    """``cache``, which, if it is an empty ``DynamicCache``, is made an ``M2RNNCache`` in place: its owner keeps it.

    Raises:
        ValueError: for another kind of cache, and for one that holds something.
    """
    if cache is None or isinstance(cache, M2RNNCache):
        return cache
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"past_key_values must be an M2RNNCache or an empty DynamicCache, got {type(cache).__name__}")
    if any(_holds_something(vars(layer)) for layer in cache.layers):
        raise ValueError(
            "past_key_values must be an M2RNNCache or an empty DynamicCache, got a DynamicCache with keys and values: "
            "a recurrent layer cannot go on from these. In place of prefix tuning, take prompt tuning"
        )
    own: Any = cache
    vars(own).clear()
    own.__class__ = M2RNNCache
    own.__init__(num_layers)
    return cache  # type: ignore[return-value]


def _holds_something(parts: Any) -> bool:
    """Whether there is a tensor among a layer's public attributes, or in a dictionary among them."""
    if isinstance(parts, dict):
        return any(_holds_something(part) for name, part in parts.items() if not str(name).startswith("_"))
    return isinstance(parts, Tensor) and parts.numel() > 0
