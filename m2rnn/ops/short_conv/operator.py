"""The fused short convolution for GPUs: public function, validation, registration, autograd.

Nothing is saved for the backward pass but the arguments. Elsewhere ``m2rnn.layers.ShortConv`` takes PyTorch's own.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, library

from m2rnn.ops.backends.checks import refuse_forward_mode
from m2rnn.ops.backends.choice import triton_is_interpreted, why_unavailable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 8  # taps at most: their sums, and the inputs that they see, live in registers


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, silu: bool = False, starts: Tensor | None = None
) -> Tensor:
    """Depthwise causal convolution of width W, a filter for each channel c::

        z[t, c] = Σ_i weight[c, i] x[t - W + 1 + i, c] + bias[c]

    with zeros before the first token; y is z, or z · σ(z) with ``silu``. Sums are float32 whatever the dtypes.

    Args:
        x: ``[B, T, C]``, float32, bfloat16 or float16, any strides; read in place where channels lie side by side.
        weight: ``[C, W]``, W at most 8, in any of these dtypes, as is ``bias`` ``[C]``.
        bias: See weight.
        silu: Whether to apply SiLU.
        starts: int32 ``[T]``, of sequences packed in one row: the first token of the sequence of each token, as in
            ``Packing.starts``. B is 1. Only compared with, so wrong values read nothing outside of x.

    Returns:
        y ``[B, T, C]`` in the dtype of x, differentiable once; gradients have the dtypes of their tensors.

    Under autocast x is cast to its dtype; weight and bias are not.

    Raises:
        ValueError: A shape, dtype or device does not fit, or Triton's kernels cannot run here.
    """
    _validate(x, weight, bias, starts)
    refuse_forward_mode("short_conv", (x, weight, bias))
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return torch.ops.m2rnn.short_conv(x, weight, bias, starts, silu)  # type: ignore[no-any-return]


def is_fast(x: Tensor, weight: Tensor) -> bool:
    """Whether ``short_conv`` takes an x and a weight [..., W] like these, in kernels compiled for a GPU."""
    taken = x.dtype in DTYPES and weight.dtype in DTYPES and weight.shape[-1] <= WIDEST
    return x.is_cuda and taken and _why_not(x.device) is None


@torch.compiler.assume_constant_result
def _why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None if they can."""
    if (reason := why_unavailable("triton")) is not None:
        return reason
    match device.type:
        case "cuda" if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} is too old for Triton, which needs compute capability 8.0"
        case "cuda":
            return None
        case "cpu" if triton_is_interpreted():
            return None
    return f"the tensors are on {device.type}"


def _validate(x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None) -> None:
    """What shapes, dtypes and devices can tell."""
    layouts = {"x": (x, "[B, T, C]"), "weight": (weight, "[C, W]")}
    if bias is not None:
        layouts["bias"] = bias, "[C]"
    for name, (tensor, layout) in layouts.items():
        if tensor.dim() != layout.count(",") + 1:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {layout}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected float32, bfloat16 or float16")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {x.device} like x")
    channels, width = weight.shape
    if channels != x.shape[2] or not 1 <= width <= WIDEST:
        expected = f"[{x.shape[2]}, 1 to {WIDEST}], since x has shape {list(x.shape)}"
        raise ValueError(f"weight has shape {list(weight.shape)}, expected {expected}")
    if bias is not None and bias.shape[0] != channels:
        raise ValueError(f"bias has shape {list(bias.shape)}, expected [{channels}] like the channels of x")
    if starts is not None:
        if starts.dtype != torch.int32 or starts.device != x.device:
            raise ValueError(f"starts is {starts.dtype} on {starts.device}, expected torch.int32 on {x.device} like x")
        if x.shape[0] != 1 or starts.dim() != 1 or starts.shape[0] != x.shape[1]:
            expected = "x [1, T, C] and starts [T] for packed sequences"
            raise ValueError(f"x has shape {list(x.shape)} and starts {list(starts.shape)}, expected {expected}")


def _kernels(x: Tensor) -> ModuleType:
    """The module of the kernels: imported when they run, since Triton takes a while."""
    if (reason := _why_not(x.device)) is not None:
        raise ValueError(f"short_conv cannot run: {reason}")
    return importlib.import_module("m2rnn.ops.short_conv.triton")


# ---------------------------------------------------------------------------------------- operators and autograd


_LIBRARY = library.Library("m2rnn", "FRAGMENT")
_LIBRARY.define(
    "short_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? starts, bool silu) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    "short_conv_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor? starts, bool silu)"
    " -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@library.impl(_LIBRARY, "short_conv", "CompositeExplicitAutograd")
def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, silu: bool) -> Tensor:
    return _kernels(x).forward(x, weight, bias, starts, silu)  # type: ignore[no-any-return]


@library.register_fake("m2rnn::short_conv", lib=_LIBRARY)
def _conv_fake(x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


@library.impl(_LIBRARY, "short_conv_backward", "CompositeExplicitAutograd")
def _conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (empty if there is none)."""
    dx, d_weight, d_bias = _kernels(x).backward(dy, x, weight, bias, starts, silu)
    return dx, d_weight, weight.new_empty(0) if d_bias is None else d_bias


@library.register_fake("m2rnn::short_conv_backward", lib=_LIBRARY)
def _conv_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_bias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), d_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, bias, starts = ctx.saved_tensors
    dx, d_weight, d_bias = torch.ops.m2rnn.short_conv_backward(dy, x, weight, bias, starts, ctx.silu)
    return dx, d_weight, None if bias is None else d_bias, None, None


library.register_autograd("m2rnn::short_conv", _autograd, setup_context=_setup_context, lib=_LIBRARY)


def _no_second_derivative(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError("short_conv can be differentiated once: its gradient has none (create_graph=True)")


library.register_autograd("m2rnn::short_conv_backward", _no_second_derivative, lib=_LIBRARY)
