"""Singular values cut at a bound, without a decomposition: products of small matrices alone.

PyTorch's decompositions make the host wait for a GPU, to ask whether they converged. Here the host waits for nothing,
and on a GPU one kernel does all matrices.
"""

import importlib.util

import torch
from torch import Tensor

from m2rnn.ops.singular_values.iterations import LIFT, LIFT_STEPS, ROOT_STEPS, SIGN_STEPS

KERNEL_WIDTH = 16  # a wider matrix does not fit into the registers of a block


def bounded(weight: Tensor, bound: Tensor | float) -> Tensor:
    """``weight`` with its singular values cut at ``bound``, the nearest such matrix: ``U min(Σ, bound) Vᵀ``.

    Computed in float64 where the device has it. A matrix that is within the bound keeps its bits.

    Args:
        weight: ``[..., V, V]``, of any floating dtype.
        bound: above 0, infinity for none; one number, or one for each matrix ``[...]``.
    """
    if has_kernel(weight):
        from m2rnn.ops.singular_values.triton import bounded_by_kernel

        return bounded_by_kernel(weight, bound)
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    eye = torch.eye(weight.shape[-1], dtype=wide, device=weight.device)
    limit = bound.to(wide)[..., None, None] if isinstance(bound, Tensor) else bound
    scaled = weight.to(wide) / limit
    # Eigenvalues of the Gram matrix, less 1: positive where a singular value is above the bound.
    over = scaled.mT @ scaled - eye
    size = torch.linalg.matrix_norm(over, keepdim=True).clamp(min=torch.finfo(wide).tiny)
    sign = over / size
    for _ in range(LIFT_STEPS):
        square = sign @ sign
        sign = sign @ (LIFT[0] * eye + LIFT[1] * square + LIFT[2] * (square @ square))
    for _ in range(SIGN_STEPS):
        sign = 1.5 * sign - 0.5 * (sign @ sign @ sign)
    larger = eye + (over + over @ sign) / 2  # max(Gram matrix, 1) in the matrix sense
    larger = (larger + larger.mT) / 2
    size = torch.linalg.matrix_norm(larger, keepdim=True)
    root, inverse = larger / size, eye.expand_as(larger)
    for _ in range(ROOT_STEPS):  # Newton and Schulz's, for the root and its inverse together
        correction = 1.5 * eye - 0.5 * (inverse @ root)
        root, inverse = root @ correction, correction @ inverse
    cut: Tensor = weight.to(wide) @ (inverse * size.rsqrt())
    return cut.to(weight.dtype)


def has_kernel(weight: Tensor) -> bool:
    """Whether one kernel cuts all matrices: on a GPU with Triton, of 16 × 16 at most."""
    if weight.device.type != "cuda" or weight.shape[-1] > KERNEL_WIDTH:
        return False
    return importlib.util.find_spec("triton") is not None
