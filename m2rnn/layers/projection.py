"""The linear layers at the ends of a mixer or an MLP."""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from m2rnn.ops.decode import FEW_ROWS, few_rows_linear


class OutputProjection(nn.Linear):
    """A linear layer without bias that adds to the residual stream; deep models start it narrower."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)


def project_token(linear: nn.Linear, x: Tensor) -> Tensor:
    """``linear(x)`` for x ``[B, in_features]``, not differentiable, by a kernel for few rows where there is one.

    Modules that are more than a linear layer (adapters, quantised or offloaded weights, hooks) are called as they are.
    """
    weight = linear.weight
    if (
        is_plain_linear(linear)
        and x.device.type == "cuda"
        and x.shape[0] <= FEW_ROWS
        and (weight.device, weight.dtype) == (x.device, x.dtype)
        and not torch.is_autocast_enabled("cuda")
    ):
        return few_rows_linear(x, weight)
    y: Tensor = linear(x)
    return y


def is_plain_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether calling the module is a product with its weight and nothing else: no bias, adapter, hook or the like."""
    return (
        isinstance(module, nn.Linear)
        and type(module) in (nn.Linear, OutputProjection)
        and module._parameters["bias"] is None
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )
