"""What a model remembers between calls of ``generate``: one state a layer."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache


class LayerState:
    """The state of one layer: a mixer's named tuple of batch-first tensors, or None before the first call."""

    is_compileable = False
    is_initialized = True
    supports_early_init = False

    def __init__(self) -> None:
        self.state: Any = None

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
            self.state = type(self.state)(*(None if x is None else fn(x) for x in self.state))


class M2RNNCache(Cache):
    """States of all layers after ``get_seq_length()`` time steps, padding included.

    The layers keep their states as they are, in their own dtypes; a new state replaces the old one and never
    writes into it.
    """

    layers: list[LayerState]  # type: ignore[assignment]

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[LayerState() for _ in range(num_layers)])  # type: ignore[misc]
        self.steps = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.steps

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.steps + query_length, 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("M2RNNCache holds whole states: set layers[i].state")

    def reset(self) -> None:
        super().reset()  # type: ignore[no-untyped-call]
        self.steps = 0

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
