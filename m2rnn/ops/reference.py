"""The M2RNN recurrence in plain PyTorch: the definition that every other backend is held to.

For each batch element and head, with a matrix state H of K rows and V columns:

    Z_t = tanh(H_{t-1} W + k_t v_tᵀ)
    H_t = f_t H_{t-1} + (1 - f_t) Z_t
    y_t = H_tᵀ q_t

Dimensions, as they appear in names such as ``state_BHKV``:
    B batch · T time · H heads · K key channels (rows of the state) · V value channels (its columns)

Source: M²RNN (arXiv 2603.14360), section 3.
"""

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the state: float64 if any input is float64, float32 otherwise."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def output_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """The dtype of y."""
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


def repeat_heads(x: Tensor, heads: int, dim: int = 2) -> Tensor:
    """Head n of the result is head ``n // (heads // x.shape[dim])`` of ``x``."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim)


class _ClampGradient(torch.autograd.Function):
    """Identity, whose gradient is clamped to [-limit, limit] (a NaN stays a NaN)."""

    @staticmethod
    def forward(ctx, x: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.clamp(-ctx.limit, ctx.limit), None


def _sequences(cu_seqlens: Tensor | None, batch: int) -> list[tuple[slice, slice]]:
    """(batch rows, time steps) of every block of sequences that runs in one loop."""
    if cu_seqlens is None:
        return [(slice(None), slice(None))]
    bounds = cu_seqlens.tolist()
    return [(slice(0, 1), slice(a, b)) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``(y, final_state)`` of the recurrence, differentiable by autograd through every step."""
    dtype = compute_dtype(q, k, v, f, weight)
    heads = max(q.shape[2], k.shape[2], v.shape[2], f.shape[2], weight.shape[0])
    q_BTHK, k_BTHK, v_BTHV, f_BTH = (repeat_heads(x.to(dtype), heads) for x in (q, k, v, f))
    weight_HVV = repeat_heads(weight.to(dtype), heads, 0)
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is None:
        initial_state = q.new_zeros(count, heads, q.shape[3], v.shape[3], dtype=dtype)
    state_NHKV = initial_state.to(dtype)

    outputs, finals = [], []
    for n, (rows, steps) in enumerate(_sequences(cu_seqlens, count)):
        state_BHKV = state_NHKV if cu_seqlens is None else state_NHKV[n : n + 1]
        inputs = (x[rows, steps].unbind(1) for x in (q_BTHK, k_BTHK, v_BTHV, f_BTH))
        for q_BHK, k_BHK, v_BHV, f_BH in zip(*inputs, strict=True):
            forget = f_BH[..., None, None]
            update_BHKV = torch.tanh(state_BHKV @ weight_HVV + k_BHK[..., None] * v_BHV[..., None, :])
            state_BHKV = forget * state_BHKV + (1 - forget) * update_BHKV
            outputs.append((q_BHK[..., None, :] @ state_BHKV).squeeze(-2))
            if state_clip is not None:  # on what the next step and the final state see: y's gradient is exact
                state_BHKV = _ClampGradient.apply(state_BHKV, state_clip)
        finals.append(state_BHKV)
    y = torch.stack(outputs, 1) if outputs else v_BTHV.new_zeros(v_BTHV.shape)
    return y.to(output_dtype(q, k, v)), torch.cat(finals) if finals else state_NHKV
