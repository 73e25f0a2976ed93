"""What a model remembers between calls of ``generate``: one state a layer."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache

_CALLED_WITH = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
#: What transformers calls the cache in a model's arguments and outputs: until 5.23 "past_key_values"
CACHE_NAME = "cache" if "cache" in _CALLED_WITH else "past_key_values"


class LayerState:
    """The state of one layer: a mixer's named tuple of batch-first tensors, or None before the first call."""

    is_compileable = False
    is_initialized = True
    supports_early_init = False

    def __init__(self) -> None:
        self.state: Any = None

    def read(self, decoding: bool) -> Any:
        """The state for the mixer's next call; ``decoding`` as ``m2rnn.layers.state.decodes`` says of that call."""
        return self.state

    def write(self, state: Any, decoding: bool = False) -> None:
        """Keep the state after that call."""
        self.state = state

    @property
    def is_croppable(self) -> bool:
        """A state can give up its last tokens if it keeps every token; a recurrent state cannot."""
        return self.state is None or hasattr(self.state, "crop")

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state = None

    def crop(self, tokens: int) -> None:
        if self.state is not None:
            self.state = self.state.crop(tokens)

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor of the state by ``fn(tensor)``."""
        if self.state is not None:
            self.write(type(self.state)(*(None if x is None else fn(x) for x in self.state)))


class StaticLayerState(LayerState):
    """A state whose tensors stay where they are: single tokens update them, and later prompts are copied into them.

    Args:
        length: how many tokens of each sequence there is room for, where a layer keeps tokens.
    """

    is_compileable = True

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.allocations = 0  #: how often the tensors were replaced, for want of room or for another batch
        self._kept: Any = None

    @property
    def is_croppable(self) -> bool:
        return self.state is None

    def get_max_length(self) -> int:
        return self.length

    def read(self, decoding: bool) -> Any:
        return self.state if decoding or not hasattr(self.state, "dynamic") else self.state.dynamic()

    def write(self, state: Any, decoding: bool = False) -> None:
        if self.state is None or not decoding:
            state = state.static(self.length) if hasattr(state, "static") else state
            if self._kept is None or [*map(_kind, state)] != [*map(_kind, self._kept)]:
                self._keep(state)
        for kept, new in zip(self._kept, state, strict=True):
            if kept is not new:
                kept.copy_(new)
        self.state = self._kept

    def _keep(self, state: Any) -> None:
        self._kept = state
        self.allocations += 1
        if "torch._dynamo" in sys.modules:  # as transformers' static cache does: for graphs made by torch.compile
            for x in state:
                if x is not None:
                    torch._dynamo.mark_static_address(x)


def _kind(x: Tensor | None) -> Any:
    """What must be equal for one tensor to be copied into another, which keeps inference tensors apart."""
    return None if x is None else (x.shape, x.dtype, x.device, x.is_inference())


class M2RNNCache(Cache):
    """States of all layers after ``get_seq_length()`` time steps, padding included.

    The layers keep their states as they are, in their own dtypes; a new state replaces the old one and never
    writes into it. Not so in a static cache: there each state stays at its address, for CUDA graphs.

    Args:
        num_layers: how many layers the model has.
        static_length: makes the cache static, with room for this many tokens of each sequence.
    """

    layers: list[LayerState]  # type: ignore[assignment]

    def __init__(self, num_layers: int, static_length: int | None = None) -> None:
        layers = [LayerState() if static_length is None else StaticLayerState(static_length) for _ in range(num_layers)]
        super().__init__(layers=layers)  # type: ignore[arg-type]
        self.static_length = static_length
        self.steps = 0

    @property
    def allocations(self) -> int:
        """How often tensors of a static cache were replaced."""
        return sum(layer.allocations for layer in self.layers if isinstance(layer, StaticLayerState))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.steps

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.steps + query_length, 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("M2RNNCache holds whole states: set layers[i].state")

    def reset(self) -> None:
        super().reset()  # type: ignore[no-untyped-call]
        self.steps = 0

    def check_room(self) -> None:
        """Raise a ValueError if a static cache with states that grow has no room for one more token."""
        full = self.static_length is not None and self.steps >= self.static_length
        if full and any(hasattr(layer.state, "append") for layer in self.layers):
            raise ValueError(f"a static cache of {self.static_length} tokens is full: make it with room for more")

    @property
    def is_croppable(self) -> bool:
        return all(layer.is_croppable for layer in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens of every sequence.

        A positive number is what to keep, as in earlier versions of transformers.

        Raises:
            ValueError: if a layer is recurrent: it keeps no earlier state.
        """
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.steps - tokens_to_remove)
        if removed == 0:
            return
        if not self.is_croppable:
            raise ValueError("a cache with recurrent layers cannot be cropped: they keep no earlier states")
        for layer in self.layers:
            layer.crop(removed)
        self.steps = max(0, self.steps - removed)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self.layers:
            layer.map(lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        for layer in self.layers:
            layer.map(lambda x: x.repeat_interleave(repeats, 0))

    @property
    def batch_size(self) -> int:
        """Number of sequences, -1 before the first call."""
        states = [layer.state for layer in self.layers if layer.state is not None]
        return states[0][0].shape[0] if states else -1
