"""The M2RNN recurrence in plain PyTorch: the definition that every other backend is held to.

For each batch element and head, with a matrix state H of K rows and V columns:

    Z_t = tanh(H_{t-1} W + k_t v_tᵀ)
    H_t = f_t H_{t-1} + (1 - f_t) Z_t
    y_t = H_tᵀ q_t

Dimensions, as they appear in names such as ``state_BHKV``:
    B batch · T time · H heads · K key channels (rows of the state) · V value channels (its columns) · N sequences

``scan`` is differentiable by autograd through every step; ``scan_backward`` is the same gradient written out.
Source: M²RNN (arXiv 2603.14360), section 3.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from m2rnn.ops.backends.dtypes import promoted_dtype, state_dtype
from m2rnn.ops.scan.problem import Gradients, Problem


def repeat_heads(x: Tensor, heads: int, dim: int = 2) -> Tensor:
    """Head n of the result is head ``n // (heads / x.shape[dim])`` of ``x``."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim)


def sum_heads(grad: Tensor, like: Tensor, dim: int = 2) -> Tensor:
    """The adjoint of ``repeat_heads``, in the shape and dtype of ``like``."""
    shared: Tensor = grad.unflatten(dim, (like.shape[dim], -1))
    return shared.sum(dim + 1).to(like.dtype)


class ClampGradient(torch.autograd.Function):
    """Identity, whose gradient is clamped to [-limit, limit] (a NaN stays a NaN)."""

    @staticmethod
    def forward(x: Tensor, limit: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.limit = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.clamp(-ctx.limit, ctx.limit), None


def sequences_of(cu_seqlens: Tensor | None) -> list[tuple[slice, slice]]:
    """(batch rows, time steps) of every block that runs in one loop: the whole batch, or one packed sequence."""
    if cu_seqlens is None:
        return [(slice(None), slice(None))]
    bounds = cu_seqlens.tolist()
    return [(slice(0, 1), slice(a, b)) for a, b in itertools.pairwise(bounds)]


def _zero_state(q: Tensor, v: Tensor, heads: int, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    return q.new_zeros(sequences, heads, q.shape[3], v.shape[3], dtype=dtype)


def _step(state_BHKV: Tensor, k_BHK: Tensor, v_BHV: Tensor, f_BH: Tensor, weight_HVV: Tensor) -> tuple[Tensor, Tensor]:
    """Z_t and H_t."""
    forget = f_BH[..., None, None]
    update_BHKV = torch.tanh(state_BHKV @ weight_HVV + k_BHK[..., :, None] * v_BHV[..., None, :])
    return update_BHKV, forget * state_BHKV + (1 - forget) * update_BHKV


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
    """``(y, final_state)``; arguments as for ``m2rnn_scan``."""
    heads, dtype = Problem(q, k, v, f, weight).heads, state_dtype(q, k, v, f, weight)
    inputs_BTHX = [repeat_heads(x.to(dtype), heads) for x in (q, k, v, f)]
    weight_HVV = repeat_heads(weight.to(dtype), heads, 0)
    if initial_state is None:
        initial_state = _zero_state(q, v, heads, cu_seqlens, dtype)
    state_NHKV = initial_state.to(dtype)

    outputs, finals = [], []
    with torch.autocast(q.device.type, enabled=False):
        for n, (rows, steps) in enumerate(sequences_of(cu_seqlens)):
            state_BHKV = state_NHKV if cu_seqlens is None else state_NHKV[n : n + 1]
            for q_BHK, k_BHK, v_BHV, f_BH in zip(*(x[rows, steps].unbind(1) for x in inputs_BTHX), strict=True):
                _, state_BHKV = _step(state_BHKV, k_BHK, v_BHV, f_BH, weight_HVV)
                outputs.append((q_BHK[..., None, :] @ state_BHKV).squeeze(-2))
                if state_clip is not None:  # on what later steps and the final state see: y's gradient stays exact
                    state_BHKV = ClampGradient.apply(state_BHKV, state_clip)  # type: ignore[no-untyped-call]
            finals.append(state_BHKV)
    y_BTHV = torch.stack(outputs, 1) if outputs else q.new_zeros(*q.shape[:2], heads, v.shape[3])
    return y_BTHV.to(promoted_dtype((q, k, v))), torch.cat(finals) if finals else state_NHKV


def scan_backward(
    dy: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    weight: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state_clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, f, the weight and the initial state (None without one), from those of y and H_T.

    With c_t the gradient that reaches H_t from later steps, and c_T that of the final state:

        G_t     = q_t dy_tᵀ + clamp(c_t)
        dX_t    = (1 - f_t) G_t ⊙ (1 - Z_t²)
        c_{t-1} = f_t G_t + dX_t Wᵀ
        dW += H_{t-1}ᵀ dX_t · dk_t = dX_t v_t · dv_t = dX_tᵀ k_t · dq_t = H_t dy_t · df_t = Σ G_t ⊙ (H_{t-1} - Z_t)
    """
    heads, dtype = Problem(q, k, v, f, weight).heads, state_dtype(q, k, v, f, weight)
    q_BTHK, k_BTHK, v_BTHV, f_BTH = (repeat_heads(x.to(dtype), heads) for x in (q, k, v, f))
    weight_HVV, dy_BTHV = repeat_heads(weight.to(dtype), heads, 0), dy.to(dtype)
    start = _zero_state(q, v, heads, cu_seqlens, dtype) if initial_state is None else initial_state.to(dtype)
    d_start = start.new_zeros(start.shape)  # dense at any strides of the state, as PyTorch's compiler is told
    if d_final is not None:
        d_start.copy_(d_final)
    dq_BTHK, dk_BTHK, dv_BTHV, df_BTH = (torch.zeros_like(x) for x in (q_BTHK, k_BTHK, v_BTHV, f_BTH))
    dweight_HVV = torch.zeros_like(weight_HVV)

    with torch.autocast(q.device.type, enabled=False):
        for n, (rows, steps) in enumerate(sequences_of(cu_seqlens)):
            these = slice(None) if cu_seqlens is None else slice(n, n + 1)
            states, updates = [start[these]], []
            times = range(*steps.indices(q.shape[1]))
            for t in times:
                update, state = _step(states[-1], k_BTHK[rows, t], v_BTHV[rows, t], f_BTH[rows, t], weight_HVV)
                updates.append(update)
                states.append(state)
            carry_BHKV = d_start[these]
            for t, previous, state, update in zip(
                reversed(times), reversed(states[:-1]), reversed(states[1:]), reversed(updates), strict=True
            ):
                dy_BHV, forget = dy_BTHV[rows, t], f_BTH[rows, t][..., None, None]
                if state_clip is not None:
                    carry_BHKV = carry_BHKV.clamp(-state_clip, state_clip)
                grad_BHKV = q_BTHK[rows, t][..., :, None] * dy_BHV[..., None, :] + carry_BHKV
                dx_BHKV = (1 - forget) * grad_BHKV * (1 - update**2)
                carry_BHKV = forget * grad_BHKV + dx_BHKV @ weight_HVV.mT
                dweight_HVV += (previous.mT @ dx_BHKV).sum(0)
                dq_BTHK[rows, t] = (state @ dy_BHV[..., None]).squeeze(-1)
                dk_BTHK[rows, t] = (dx_BHKV @ v_BTHV[rows, t][..., None]).squeeze(-1)
                dv_BTHV[rows, t] = (dx_BHKV.mT @ k_BTHK[rows, t][..., None]).squeeze(-1)
                df_BTH[rows, t] = (grad_BHKV * (previous - update)).sum((-2, -1))
            d_start[these] = carry_BHKV
    inputs = ((dq_BTHK, q), (dk_BTHK, k), (dv_BTHV, v), (df_BTH, f))
    dq, dk, dv, df = (sum_heads(grad, x) for grad, x in inputs)
    d_initial = None if initial_state is None else d_start.to(initial_state.dtype)
    return dq, dk, dv, df, sum_heads(dweight_HVV, weight, 0), d_initial


# ---------------------------------------------------------------------------------------- as a backend of the operator


def why_not(problem: Problem) -> str | None:
    """It takes everything."""
    return None


def saved_like(problem: Problem) -> Tensor:
    """Nothing: the backward pass computes all states again."""
    return problem.q.new_empty(0, dtype=problem.state_dtype)


def forward(problem: Problem, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    with torch.no_grad():
        y, final = scan(*problem._replace(state_clip=None))
    return y, final.clone(), saved_like(problem) if save else None


def backward(problem: Problem, saved: Tensor, dy: Tensor, d_final: Tensor | None) -> Gradients:
    return scan_backward(dy, d_final, *problem)
