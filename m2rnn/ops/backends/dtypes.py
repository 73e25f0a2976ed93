"""The dtypes of states and outputs, the same for every backend."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def state_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, float32 otherwise."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def promoted_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype that all of them promote to."""
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors))
