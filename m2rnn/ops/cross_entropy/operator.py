"""Cross-entropy of a linear layer's outputs, with its gradients computed in the forward pass.

A language model's logits are its largest tensor by far. Here a part of them at a time is made in 16 bits, turned in
place into its own gradient by one kernel, used for the two products of the backward pass and dropped: no float32 copy,
and nothing is computed again. torch's own ``linear_cross_entropy`` (2.13) returns a 16-bit loss.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
LOGITS_PER_CHUNK = 2**29  # 1 GiB of bfloat16
TILE = 128  # rows of a chunk are a multiple: a matrix product's own tiles
ALIGNED = 64  # columns of logits are a multiple, zeros at the end: matrix products and loads want addresses to be round


def why_not(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> str | None:
    """Why ``linear_cross_entropy`` cannot run on these tensors, or None if it can."""
    if hidden.device.type != "cuda" or weight.device != hidden.device:
        return f"its kernel needs a GPU, the tensors are on {hidden.device.type} and {weight.device.type}"
    if dtype != torch.bfloat16:  # in float16 a probability of 1e-5 is denormal, and gradient scaling comes too late
        return f"its kernel takes bfloat16, not {str(dtype)[6:]}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, chunk_size: int | None = None
) -> Tensor:
    """``-Σ log softmax(weight · hidden)[label]`` over labels other than -100.

    Args:
        hidden: ``[n, D]``, any floating dtype.
        weight: ``[vocabulary, D]``, any floating dtype.
        labels: int64 ``[n]``; for one that is neither -100 nor a row of the weight the result is NaN.
        dtype: of the matrix products and of the logits; sums and the loss are float32.
        chunk_size: rows whose logits exist at once; default ``LOGITS_PER_CHUNK / vocabulary``, in equal parts.

    Returns:
        A float32 number, differentiable once; so are gradients, cast to the dtypes of hidden and weight.
    """
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, dtype, chunk_size)  # type: ignore[no-untyped-call]
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, chunk_size: int | None
    ) -> Tensor:
        from m2rnn.ops.cross_entropy.triton import to_gradient_

        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        rows, vocabulary = hidden.shape[0], weight.shape[0]
        chunk_size = _even_chunks(rows, vocabulary) if chunk_size is None else chunk_size
        with torch.autocast(hidden.device.type, enabled=False):
            x, w = hidden.to(dtype), F.pad(weight.to(dtype), (0, 0, 0, -vocabulary % ALIGNED))
            losses = x.new_empty(rows, dtype=torch.float32)
            d_hidden = torch.empty_like(x) if wants_hidden else x.new_empty(0)
            d_weight = w.new_zeros(w.shape if wants_weight else 0, dtype=torch.float32)
            for start in range(0, rows, chunk_size):
                part = slice(start, start + chunk_size)
                logits = x[part] @ w.T
                to_gradient_(logits, labels[part], losses[part], vocabulary)
                if wants_hidden:
                    torch.mm(logits, w, out=d_hidden[part])
                if wants_weight:
                    d_weight += logits.T @ x[part]
                del logits  # before the next part's
        ctx.save_for_backward(d_hidden, d_weight[:vocabulary])
        ctx.dtypes = hidden.dtype, weight.dtype
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden, d_weight = ctx.saved_tensors
        return (
            (d_hidden * gradient).to(ctx.dtypes[0]) if wants_hidden else None,
            (d_weight * gradient).to(ctx.dtypes[1]) if wants_weight else None,
            None,
            None,
            None,
        )


def _even_chunks(rows: int, vocabulary: int) -> int:
    """Rows of a chunk, a multiple of ``TILE``: as few chunks as there is room for, all of about the same size."""
    largest = max(1, LOGITS_PER_CHUNK // (vocabulary * TILE)) * TILE
    chunks = max(1, -(-rows // largest))
    return max(1, -(-rows // (chunks * TILE))) * TILE
