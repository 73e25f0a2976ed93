"""The kernel of ``bounded``: a block a matrix, which stays in registers for all iterations."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2rnn.ops.backends.triton import on_device_of
from m2rnn.ops.singular_values.iterations import LIFT, LIFT_STEPS, ROOT_STEPS, SIGN_STEPS

WARPS = 1  # sums of a matrix need no barrier: 2.7 ms for 14 launches on an H200, 5.1 with 4 warps


def bounded_by_kernel(weight: Tensor, bound: Tensor | float) -> Tensor:
    """``bounded`` for matrices of up to 16 × 16, in one launch."""
    matrices = weight.contiguous().view(-1, *weight.shape[-2:])
    if not isinstance(bound, Tensor):
        bound = torch.full((), bound, dtype=torch.float64, device=weight.device)
    bounds = bound.double().expand(weight.shape[:-2]).reshape(-1).contiguous()
    cut = torch.empty_like(matrices)
    if len(matrices):
        width = weight.shape[-1]
        with on_device_of(weight):
            _cut[(len(matrices),)](
                matrices,
                bounds,
                cut,
                width,
                WIDTH=triton.next_power_of_2(width),
                LIFT=LIFT,
                LIFT_STEPS=LIFT_STEPS,
                SIGN_STEPS=SIGN_STEPS,
                ROOT_STEPS=ROOT_STEPS,
                num_warps=WARPS,
            )
    return cut.view(weight.shape)


@triton.jit
def _cut(
    matrices, bounds, cut, width,
    WIDTH: tl.constexpr, LIFT: tl.constexpr,
    LIFT_STEPS: tl.constexpr, SIGN_STEPS: tl.constexpr, ROOT_STEPS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (row < width) & (column < width)
    place = number * width * width + row * width + column
    # Zeros around the matrix: singular values of 0, which no bound cuts
    weight = tl.load(matrices + place, mask=inside, other=0.0).to(tl.float64)
    eye = tl.where(row == column, 1.0, 0.0).to(tl.float64)
    scaled = weight / tl.load(bounds + number)
    over = _product(tl.trans(scaled), scaled) - eye
    sign = over / tl.maximum(tl.sqrt(tl.sum(over * over)), 1e-300)
    for _ in range(LIFT_STEPS):
        square = _product(sign, sign)
        sign = _product(sign, LIFT[0] * eye + LIFT[1] * square + LIFT[2] * _product(square, square))
    for _ in range(SIGN_STEPS):
        sign = 1.5 * sign - 0.5 * _product(_product(sign, sign), sign)
    larger = eye + (over + _product(over, sign)) * 0.5
    larger = (larger + tl.trans(larger)) * 0.5
    size = tl.sqrt(tl.sum(larger * larger))
    root, inverse = larger / size, eye
    for _ in range(ROOT_STEPS):
        correction = 1.5 * eye - 0.5 * _product(inverse, root)
        root, inverse = _product(root, correction), _product(correction, inverse)
    result = _product(weight, inverse) / tl.sqrt(size)
    tl.store(cut + place, result.to(cut.dtype.element_ty), mask=inside)


@triton.jit
def _product(a, b):
    """On the ordinary units: the tensor cores would round."""
    return tl.sum(a[:, :, None] * b[None, :, :], 1)
