"""What follows from the shapes and dtypes of the operator's arguments alone, the same for every backend."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

TRITON_CHUNK = 64  #: steps between the states that the Triton kernels save
CUDA_CHUNK = 32  #: steps between the states that the CUDA kernels save


def head_count(q: Tensor, k: Tensor, v: Tensor, f: Tensor, weight: Tensor) -> int:
    """H: the largest head count of [B, T, heads, ...] tensors and the weight [heads, V, V]."""
    return max(q.shape[2], k.shape[2], v.shape[2], f.shape[2], weight.shape[0])


def state_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, float32 otherwise."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def promoted_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype that all of them promote to."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors))


def output_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """The dtype of y."""
    return promoted_dtype((q, k, v))


def chunk_length(steps: int) -> int:
    """C, the steps between saved states: a power of two near √T, where T/C saved and C recomputed states balance."""
    return 16 if steps <= 512 else 32 if steps <= 2048 else 64


def saved_states(batch: int, steps: int, packed: bool, chunk: int | None = None) -> int:
    """Room for the state at the start of every chunk but a sequence's first; for packed sequences an upper bound."""
    chunk = chunk or chunk_length(steps)
    if packed:
        return steps // chunk
    return batch * max((steps + chunk - 1) // chunk - 1, 0)


def cuda_width(value_dim: int) -> int:
    """V as the CUDA kernels have it: the next of 8, 16, 32 and 64."""
    return next(width for width in (8, 16, 32, 64) if value_dim <= width)


def cuda_parts(dtype: torch.dtype, steps: int, cu_seqlens: Tensor | None = None) -> int:
    """How many bfloat16 numbers each number is the sum of in the CUDA kernels' matrix products.

    One for bfloat16. But y of few steps (of a pack, on average) may be a sum that cancels; a second costs little there.
    """
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    few = steps <= CUDA_CHUNK * sequences
    return {torch.bfloat16: 2 if few else 1, torch.float16: 2, torch.float32: 3}[dtype]
