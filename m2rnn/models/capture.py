"""Decoding in a CUDA graph: the whole model's forward for one token as one launch."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from m2rnn.layers.state import decodes
from m2rnn.models.cache import CACHE_NAME, M2RNNCache


class CapturedDecoding:
    """A model's forward for one token of each sequence, captured at the second such call with a static cache.

    The first call is an ordinary one, which compiles kernels and lets libraries allocate what they need. A graph serves
    until the shapes, the cache's tensors, the weights' places or autocast change. Results are overwritten by the next
    call. Copies and pickles start anew.
    """

    def __init__(self) -> None:
        self._cache: M2RNNCache | None = None  # of generate calls that do not return theirs
        self._surroundings: Any = None
        self._captured_for: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}
        self._outputs: Any = None

    def __reduce__(self) -> tuple[type["CapturedDecoding"], tuple[()]]:
        return CapturedDecoding, ()

    def static_cache(self, num_layers: int, length: int) -> M2RNNCache:
        """The cache of an earlier ``generate``, emptied, so that its graph serves again; a larger one if need be."""
        if self._cache is None or (self._cache.static_length or 0) < length:
            self._cache = M2RNNCache(num_layers, length)
        self._cache.reset()
        return self._cache

    def start(self, model: PreTrainedModel) -> None:
        """Before the first token of a sequence: drop the graph if it was captured in other surroundings."""
        surroundings = (
            [parameter.data_ptr() for parameter in model.parameters()],
            model.training,
            torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
            torch.is_inference_mode_enabled(),
        )
        if surroundings != self._surroundings:
            self._surroundings, self._captured_for, self._graph, self._outputs = surroundings, None, None, None

    def __call__(self, model: PreTrainedModel, **inputs: Any) -> Any:
        cache, ids = inputs[CACHE_NAME], inputs.get("input_ids")
        if ids is None or not decodes(ids) or cache.steps == 0 or _returns_more(model, inputs):
            return model(**inputs)
        tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
        others = {name: x for name, x in inputs.items() if name not in tensors and name != CACHE_NAME}
        shapes = {name: (x.shape, x.dtype) for name, x in tensors.items()}
        call = cache, cache.allocations, shapes, others
        if self._captured_for is None or self._captured_for[0] is not cache or self._captured_for[1:] != call[1:]:
            self._captured_for, self._graph, self._outputs = call, None, None
            return model(**inputs)
        cache.check_room()
        if self._graph is None:
            self._inputs = {name: x.clone() for name, x in tensors.items()}
            steps, graph = cache.steps, torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._outputs = model(**inputs | self._inputs)
            cache.steps, self._graph = steps, graph  # nothing has run yet
        for name, x in tensors.items():
            self._inputs[name].copy_(x)
        self._graph.replay()
        cache.steps += 1
        return self._outputs


def _returns_more(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Whether the caller keeps more of the outputs than a token's logits, which the next call would overwrite."""
    wanted = inputs.get("output_hidden_states")
    return bool(model.config.output_hidden_states if wanted is None else wanted)
