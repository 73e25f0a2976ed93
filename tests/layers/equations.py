"""What the layers' equations share, written out for one sequence, and how a layer is held against them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.tolerances import assert_close


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """A causal convolution of ``x`` [T, C], a tap at a time."""
    taps = weight.shape[2]
    return torch.stack(
        [
            bias + sum(weight[:, 0, taps - 1 - lag] * x[t - lag] for lag in range(taps) if t >= lag)
            for t in range(len(x))
        ]
    )


def rms_norm(y: Tensor, weight: Tensor) -> Tensor:
    return y / torch.sqrt((y * y).mean() + 1e-5) * weight


def assert_layer_is(layer: nn.Module, equations: Callable[[Tensor], Tensor], hidden_size: int) -> None:
    """Output and every gradient of ``layer`` in float64, with random parameters, are those of ``equations``."""
    layer.double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.1, 0.7)
    x = torch.randn(7, hidden_size, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x[None])
    expected = equations(x)
    assert_close(y[0], expected, torch.float64, "output")
    inputs = [x, *layer.parameters()]
    cotangent = torch.randn_like(expected)
    ours = torch.autograd.grad(y[0], inputs, cotangent)
    theirs = torch.autograd.grad(expected, inputs, cotangent)
    names = ["x", *dict(layer.named_parameters())]
    for one, other, name in zip(ours, theirs, names, strict=True):
        assert_close(one, other, torch.float64, "gradient", name)
