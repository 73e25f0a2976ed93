"""The vector recurrences in plain PyTorch: the definition that every other backend is held to.

For each sequence and head, with a state h of V units, the RNN and the GRU:

    h_t = tanh(h_{t-1} W + x_t)

    f_t = σ(h_{t-1} W_f + x_t^f)    r_t = σ(h_{t-1} W_r + x_t^r)
    z_t = tanh((r_t ⊙ h_{t-1}) W + x_t)
    h_t = f_t ⊙ h_{t-1} + (1 - f_t) ⊙ z_t

Both are one loop: without gates, f = 0 and r = 1.
Dimensions, as they appear in names such as ``state_HBV``: B batch · T time · H heads · V units · N sequences

``scan`` is differentiable by autograd through every step; ``scan_backward`` is the same gradient written out.
"""

import torch
from torch import Tensor

from m2rnn.ops.backends.dtypes import promoted_dtype, state_dtype
from m2rnn.ops.scan.reference import ClampGradient, sequences_of
from m2rnn.ops.vector_scan.problem import Gradients, Problem


def _zero_state(x: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor:
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    return x.new_zeros(sequences, *x.shape[2:], dtype=dtype)


def _steps(inputs: list[Tensor], rows: slice, steps: slice, dtype: torch.dtype) -> list[Tensor]:
    """What one loop over time takes of each input, as [T, H, B, V]."""
    return [x[rows, steps].to(dtype).permute(1, 2, 0, 3) for x in inputs]


def _gates(
    state_HBV: Tensor, inputs_THBV: list[Tensor], weights_HVV: list[Tensor], t: int
) -> tuple[Tensor | float, Tensor | float]:
    """f_t and r_t."""
    if len(inputs_THBV) == 1:
        return 0.0, 1.0
    forget_HBV, reset_HBV = (
        torch.sigmoid(torch.baddbmm(x_THBV[t], state_HBV, weight_HVV))
        for x_THBV, weight_HVV in zip(inputs_THBV[1:], weights_HVV[1:], strict=True)
    )
    return forget_HBV, reset_HBV


def scan(
    inputs: list[Tensor],
    weights: list[Tensor],
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``(y, final_state)``; ``inputs`` is [x] or [x, x^f, x^r], ``weights`` [W] or [W, W_f, W_r]."""
    dtype = state_dtype(*inputs, *weights)
    weights_HVV = [weight.to(dtype) for weight in weights]
    start = _zero_state(inputs[0], cu_seqlens, dtype) if initial_state is None else initial_state.to(dtype)
    outputs, finals = [], []
    with torch.autocast(start.device.type, enabled=False):
        for n, (rows, steps) in enumerate(sequences_of(cu_seqlens)):
            inputs_THBV = _steps(inputs, rows, steps, dtype)
            state_HBV = (start if cu_seqlens is None else start[n : n + 1]).transpose(0, 1)
            for t in range(inputs_THBV[0].shape[0]):
                forget_HBV, reset_HBV = _gates(state_HBV, inputs_THBV, weights_HVV, t)
                update_HBV = torch.tanh(torch.baddbmm(inputs_THBV[0][t], reset_HBV * state_HBV, weights_HVV[0]))
                state_HBV = forget_HBV * state_HBV + (1 - forget_HBV) * update_HBV
                outputs.append(state_HBV.transpose(0, 1))
                if state_clip is not None:  # on what later steps and the final state see: y's gradient stays exact
                    state_HBV = ClampGradient.apply(state_HBV, state_clip)  # type: ignore[no-untyped-call]
            finals.append(state_HBV.transpose(0, 1))
    y_BTHV = torch.stack(outputs, 1) if outputs else inputs[0].new_zeros(inputs[0].shape)
    return y_BTHV.to(promoted_dtype(inputs)), torch.cat(finals) if finals else start


def scan_backward(
    dy: Tensor,
    d_final: Tensor | None,
    inputs: list[Tensor],
    weights: list[Tensor],
    initial_state: Tensor | None,
    y: Tensor,
    cu_seqlens: Tensor | None = None,
    state_clip: float | None = None,
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Gradients of the inputs, the weights, and the initial state (None without one).

    y_t is the state h_t, so nothing else was saved. With c_t the gradient that reaches h_t from later steps:

        g_t     = dy_t + clamp(c_t)
        dx_t    = (1 - f_t) ⊙ g_t ⊙ (1 - z_t²)              u_t = dx_t Wᵀ
        dx_t^f  = g_t ⊙ (h_{t-1} - z_t) ⊙ f_t ⊙ (1 - f_t)
        dx_t^r  = u_t ⊙ h_{t-1} ⊙ r_t ⊙ (1 - r_t)
        c_{t-1} = f_t ⊙ g_t + r_t ⊙ u_t + dx_t^f W_fᵀ + dx_t^r W_rᵀ
        dW += (r_t ⊙ h_{t-1})ᵀ dx_t    dW_f += h_{t-1}ᵀ dx_t^f    dW_r += h_{t-1}ᵀ dx_t^r
    """
    dtype = state_dtype(*inputs, *weights)
    weights_HVV = [weight.to(dtype) for weight in weights]
    start = _zero_state(inputs[0], cu_seqlens, dtype) if initial_state is None else initial_state.to(dtype)
    # Gradients are dense at any strides of what they are of, as PyTorch's compiler is told
    d_start = start.new_zeros(start.shape)
    if d_final is not None:
        d_start.copy_(d_final)
    d_inputs_BTHV = [x.new_zeros(x.shape, dtype=dtype) for x in inputs]
    d_weights_HVV = [weight.new_zeros(weight.shape) for weight in weights_HVV]

    with torch.autocast(start.device.type, enabled=False):
        for n, (rows, steps) in enumerate(sequences_of(cu_seqlens)):
            inputs_THBV = _steps(inputs, rows, steps, dtype)
            dy_THBV, y_THBV = _steps([dy, y], rows, steps, dtype)
            d_inputs_THBV = _steps(d_inputs_BTHV, rows, steps, dtype)  # views, written to below
            these = slice(None) if cu_seqlens is None else slice(n, n + 1)
            carry_HBV = d_start[these].transpose(0, 1)
            for t in reversed(range(inputs_THBV[0].shape[0])):
                state_HBV = y_THBV[t - 1] if t > 0 else start[these].transpose(0, 1)
                forget_HBV, reset_HBV = _gates(state_HBV, inputs_THBV, weights_HVV, t)
                kept_HBV = reset_HBV * state_HBV
                update_HBV = torch.tanh(torch.baddbmm(inputs_THBV[0][t], kept_HBV, weights_HVV[0]))
                if state_clip is not None:
                    carry_HBV = carry_HBV.clamp(-state_clip, state_clip)
                grad_HBV = dy_THBV[t] + carry_HBV
                dx_HBV = (1 - forget_HBV) * grad_HBV * (1 - update_HBV**2)
                d_kept_HBV = dx_HBV @ weights_HVV[0].mT
                carry_HBV = forget_HBV * grad_HBV + reset_HBV * d_kept_HBV
                products = [(kept_HBV, dx_HBV)]  # of each weight: what it multiplied, and the product's gradient
                if len(inputs) > 1:
                    d_forget_HBV = grad_HBV * (state_HBV - update_HBV) * forget_HBV * (1 - forget_HBV)
                    d_reset_HBV = d_kept_HBV * state_HBV * reset_HBV * (1 - reset_HBV)
                    carry_HBV = carry_HBV + d_forget_HBV @ weights_HVV[1].mT + d_reset_HBV @ weights_HVV[2].mT
                    products += [(state_HBV, d_forget_HBV), (state_HBV, d_reset_HBV)]
                for i, (factor_HBV, d_product_HBV) in enumerate(products):
                    d_inputs_THBV[i][t] = d_product_HBV
                    d_weights_HVV[i] += factor_HBV.mT @ d_product_HBV
            d_start[these] = carry_HBV.transpose(0, 1)
    d_inputs = [d.to(x.dtype) for d, x in zip(d_inputs_BTHV, inputs, strict=True)]
    d_weights = [d.to(weight.dtype) for d, weight in zip(d_weights_HVV, weights, strict=True)]
    return d_inputs, d_weights, None if initial_state is None else d_start.to(initial_state.dtype)


# ---------------------------------------------------------------------------------------- as a backend of the operator


def why_not(problem: Problem) -> str | None:
    """It takes everything."""
    return None


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        y, final = scan(*problem._replace(state_clip=None))
    return y, final.clone()


def backward(problem: Problem, y: Tensor, dy: Tensor, d_final: Tensor | None) -> Gradients:
    inputs, weights, initial_state, cu_seqlens, state_clip = problem
    return scan_backward(dy, d_final, inputs, weights, initial_state, y, cu_seqlens, state_clip)
