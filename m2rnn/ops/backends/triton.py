"""What the Triton kernels of all operators share."""

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALLEST_TILE = 16  # of a matrix product in Triton
INTERPRETED = bool(triton.knobs.runtime.interpret)
NVIDIA = torch.version.hip is None and not INTERPRETED
TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class View(NamedTuple):
    """A tensor [batch, step, head, channel] at any strides; ``repeat`` heads of the state read the same one of its.

    Triton compiles anew for an integer in a tuple that is 1 or a multiple of 16. So the kernels get 2n + 1 for n; but
    for ``channel``, whose being 1 is worth a kernel.
    """

    data: Tensor
    batch: int
    step: int
    head: int
    repeat: int
    channel: int


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@triton.jit
def tanh(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:  # one instruction, relative error 2^-11
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        size = tl.abs(x)
        decay = tl.exp(-2 * size)
        y = (1 - decay) / (1 + decay)
        # Where 1 - decay cancels: a series; in float64 expm1 by Kahan's trick, since constants have float32 precision.
        small = tl.where(size < 0.25, size, 0.0)
        if x.dtype == tl.float64:
            decay = tl.exp(-2 * small)
            ratio = tl.where(decay < 1, -2 * small / tl.log(tl.where(decay < 1, decay, 2.0)), 1.0)
            difference = tl.where(decay < 1, (decay - 1) * ratio, -2 * small)
            series = -difference / (2 + difference)
        else:
            square = small * small
            series = square * (square * (62.0 / 2835.0) - 17.0 / 315.0) + 2.0 / 15.0
            series = small + small * square * (square * series - 1.0 / 3.0)
        y = tl.where(size < 0.25, series, y)
        y = tl.where(x < 0, -y, y)
    return y


@triton.jit
def tanh_slope(x, z, APPROXIMATE: tl.constexpr):
    """1 - z² for z = tanh(x), without its cancellation near 1: (1 - |z|) / (1 + |z|) is exp(-2 |x|)."""
    size = tl.abs(x)
    if APPROXIMATE:  # Triton's own exp spends four more instructions on denormal results
        exponent = size * (-2 * 1.4426950408889634)
        ratio = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [exponent], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        ratio = tl.exp(-2 * size)
    factor = 1 + tl.abs(z)
    return ratio * factor * factor


@triton.jit
def place(x, batch, step, head):
    """Where a ``View`` has the channels of a step."""
    return x.data + batch * (x.batch >> 1) + step * (x.step >> 1) + head // (x.repeat >> 1) * (x.head >> 1)


@triton.jit
def load(x, at, step, index, mask, DTYPE: tl.constexpr):
    """The channels ``index`` of a ``View``, ``step`` steps after ``at``."""
    return tl.load(at + step * (x.step >> 1) + index * x.channel, mask=mask, other=0.0).to(DTYPE)
