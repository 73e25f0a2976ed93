"""The linear layers at the ends of a mixer or an MLP."""

from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2rnn.ops.decode import FEW_ROWS, few_rows_linear

ALIGNED = 8  # channels, 16 bytes: a product with 2,900 columns takes a GPU three times as long as one with 2,904
MANY_ROWS = 1024  # from which on that matters more than a padded copy of the weight


class OutputProjection(nn.Linear):
    """A linear layer without bias that adds to the residual stream; deep models start it narrower."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)


def project_token(linear: nn.Linear, x: Tensor) -> Tensor:
    """``linear(x)`` for x ``[B, in_features]``, not differentiable, by a kernel for few rows where there is one.

    Modules that are more than a linear layer (adapters, quantised or offloaded weights, hooks) are called as they are.
    """
    if (
        is_plain_linear(linear)
        and x.device.type == "cuda"
        and x.shape[0] <= FEW_ROWS
        and (linear.weight.device, linear.weight.dtype) == (x.device, x.dtype)
        and not torch.is_autocast_enabled("cuda")
    ):
        return few_rows_linear(x, linear.weight)
    y: Tensor = linear(x)
    return y


def project_parts(linear: nn.Linear, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """``linear(x).split(sizes, -1)``, with a few more columns, not returned, where a GPU is slow without them."""
    if x.device.type == "cuda" and sum(sizes) % ALIGNED and x.numel() >= MANY_ROWS * linear.in_features:
        dtype = product_dtype(x)
        if dtype in (torch.bfloat16, torch.float16) and is_plain_linear(linear):
            return _project_aligned(linear.weight.to(dtype), x.to(dtype), sizes)
    parts: tuple[Tensor, ...] = linear(x).split(sizes, -1)
    return parts


def _project_aligned(weight: Tensor, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    missing = -weight.shape[0] % ALIGNED
    # Split at once: to cut off the columns first would cost a copy in the backward pass
    parts: tuple[Tensor, ...] = F.linear(x, F.pad(weight, (0, 0, 0, missing))).split((*sizes, missing), -1)
    return parts[:-1]


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product of x with a weight of its dtype or wider: autocast's, if it is on."""
    device = x.device.type
    autocast = device != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def is_plain_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether calling the module is a product with its weight and nothing else: no bias, adapter, hook or the like."""
    return (
        isinstance(module, nn.Linear)
        and type(module) in (nn.Linear, OutputProjection)
        and module._parameters["bias"] is None
        and is_plain_weight(module.weight)
        and runs_as_written(module)
    )


def is_plain_weight(weight: Tensor) -> bool:
    """One of another class is more than numbers: a shard, as of FSDP outside its own forward pass, or quantised."""
    return type(weight) in (Tensor, nn.Parameter)


def runs_as_written(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else: no hooks, and no other forward, which is
    how accelerate fetches offloaded weights."""
    return (
        "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )
