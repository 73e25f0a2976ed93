"""Triton kernels of the vector recurrences, RNN and GRU.

A program takes a block of sequences of one head through time, their states in registers as the rows of a matrix, which
share the head's W. The backward pass reads the states from y, so it recomputes a step's gates where it needs them; the
gradient of W is summed in registers, one sum a program, and these are added in a fixed order: no atomics, the same bits
every time. Sequences of different lengths are masked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2rnn.ops.backends.triton import (
    INTERPRETED,
    NVIDIA,
    SMALLEST_TILE,
    TRITON_DTYPES,
    View,
    load,
    on_device_of,
    place,
    tanh,
    tanh_slope,
)
from m2rnn.ops.vector_scan.problem import Gradients, Problem

ROWS = SMALLEST_TILE  # sequences of a program
# Arguments whose values the kernels are not compiled for
_GENERAL = (
    *("x", "x_forget", "x_reset", "y", "dy", "dx", "dx_forget", "dx_reset", "weights", "d_weights", "initial", "state"),
    *("d_state", "offsets", "sequences", "steps", "heads", "units"),
)


@triton.jit
def _sigmoid(x, APPROXIMATE: tl.constexpr):
    return 0.5 + 0.5 * tanh(0.5 * x, APPROXIMATE)


@triton.jit
def _rows(offsets, sequences, steps, heads, R: tl.constexpr):
    """Of a program: its head, its sequences, and of each the batch index, the first step and how many steps it has."""
    program = tl.program_id(0).to(tl.int64)
    head, rows = program % heads, program // heads * R + tl.arange(0, R)
    inside = rows < sequences
    if offsets is None:
        batch, first, length = tl.where(inside, rows, 0), rows * 0, tl.where(inside, steps, 0)
    else:  # inside memory even if they were not checked
        batch = rows * 0
        first = tl.minimum(tl.maximum(tl.load(offsets + rows, mask=inside, other=0).to(tl.int64), 0), steps)
        length = tl.minimum(tl.load(offsets + rows + 1, mask=inside, other=0).to(tl.int64), steps) - first
    return head, rows, batch[:, None], first[:, None], length[:, None]


@triton.jit
def _matrix(weights, index, heads, head, units, V: tl.constexpr):
    """Matrix ``index`` of a head, from dense [matrices, heads, V, V]: where it lies, and its elements."""
    rows, cols = tl.arange(0, V)[:, None], tl.arange(0, V)[None, :]
    at = weights + (index * heads + head) * units * units + rows * units + cols
    return tl.load(at, mask=(rows < units) & (cols < units), other=0.0)


@triton.jit(do_not_specialize=_GENERAL)
def _forward_kernel(
    x, x_forget, x_reset, weights, y, state, offsets, sequences, steps, heads, units,
    R: tl.constexpr, V: tl.constexpr, STATE: tl.constexpr, OPERAND: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """R sequences of a head: y, and the state in place."""
    head, rows, batch, first, length = _rows(offsets, sequences, steps, heads, R)
    last, cols = tl.max(length), tl.arange(0, V)[None, :]
    w = _matrix(weights, 0, heads, head, units, V).to(OPERAND)
    x_at, y_at = place(x, batch, first, head), place(y, batch, first, head)
    x_t = load(x, x_at, 0, cols, (length > 0) & (cols < units), STATE)
    if x_forget is not None:
        w_forget = _matrix(weights, 1, heads, head, units, V).to(OPERAND)
        w_reset = _matrix(weights, 2, heads, head, units, V).to(OPERAND)
        forget_at, reset_at = place(x_forget, batch, first, head), place(x_reset, batch, first, head)
        forget_t = load(x_forget, forget_at, 0, cols, (length > 0) & (cols < units), STATE)
        reset_t = load(x_reset, reset_at, 0, cols, (length > 0) & (cols < units), STATE)
    state_at, valid = (
        state + (rows[:, None] * heads + head) * units + cols,
        (rows < sequences)[:, None] & (cols < units),
    )
    h = tl.load(state_at, mask=valid, other=0.0)
    for t in range(last):
        mask, following = (length > t) & (cols < units), (length > t + 1) & (cols < units)
        pre = x_t
        x_t = load(x, x_at, t + 1, cols, following, STATE)  # loaded while this step is computed
        if x_forget is not None:
            pre_forget, pre_reset = forget_t, reset_t
            forget_t = load(x_forget, forget_at, t + 1, cols, following, STATE)
            reset_t = load(x_reset, reset_at, t + 1, cols, following, STATE)
            operand = h.to(OPERAND)
            f = _sigmoid(tl.dot(operand, w_forget, pre_forget, input_precision="ieee", out_dtype=STATE), APPROXIMATE)
            r = _sigmoid(tl.dot(operand, w_reset, pre_reset, input_precision="ieee", out_dtype=STATE), APPROXIMATE)
            kept = (r * h).to(OPERAND)
            z = tanh(tl.dot(kept, w, pre, input_precision="ieee", out_dtype=STATE), APPROXIMATE)
            new = f * h + (1 - f) * z
        else:
            new = tanh(tl.dot(h.to(OPERAND), w, pre, input_precision="ieee", out_dtype=STATE), APPROXIMATE)
        h = tl.where(mask, new, h)
        tl.store(y_at + t * (y.step >> 1) + cols * y.channel, h, mask=mask)
    tl.store(state_at, h, mask=valid)


@triton.jit(do_not_specialize=_GENERAL)
def _backward_kernel(
    dy, x, x_forget, x_reset, weights, initial, y, dx, dx_forget, dx_reset, d_weights, d_state, clip,
    offsets, sequences, steps, heads, units, R: tl.constexpr, V: tl.constexpr, STATE: tl.constexpr,
    OPERAND: tl.constexpr, APPROXIMATE: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same sequences back: the gradients of inputs, the program's part of that of the matrices, and in place the
    gradient of the state."""
    head, rows, batch, first, length = _rows(offsets, sequences, steps, heads, R)
    last, cols = tl.max(length), tl.arange(0, V)[None, :]
    limit = tl.load(clip)
    w = _matrix(weights, 0, heads, head, units, V).to(OPERAND)
    w_back, dw = tl.trans(w).to(GRADIENT), tl.zeros([V, V], STATE)
    x_at, y_at, dy_at = place(x, batch, first, head), place(y, batch, first, head), place(dy, batch, first, head)
    dx_at = place(dx, batch, first, head)
    if x_forget is not None:
        w_forget = _matrix(weights, 1, heads, head, units, V).to(OPERAND)
        w_reset = _matrix(weights, 2, heads, head, units, V).to(OPERAND)
        forget_back, reset_back = tl.trans(w_forget).to(GRADIENT), tl.trans(w_reset).to(GRADIENT)
        dw_forget, dw_reset = tl.zeros([V, V], STATE), tl.zeros([V, V], STATE)
        forget_at, reset_at = place(x_forget, batch, first, head), place(x_reset, batch, first, head)
        d_forget_at, d_reset_at = place(dx_forget, batch, first, head), place(dx_reset, batch, first, head)
    valid = (rows < sequences)[:, None] & (cols < units)
    states = (rows[:, None] * heads + head) * units + cols
    h_first = tl.load(initial + states, mask=valid, other=0.0)
    carry = tl.load(d_state + states, mask=valid, other=0.0)
    for step in range(last):
        t = last - 1 - step
        mask = (length > t) & (cols < units)
        h = tl.where(t > 0, load(y, y_at, t - 1, cols, mask & (t > 0), STATE), tl.where(mask, h_first, 0.0))
        g = load(dy, dy_at, t, cols, mask, STATE)
        g += tl.clamp(carry, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        kept = h
        if x_forget is not None:
            pre_forget = load(x_forget, forget_at, t, cols, mask, STATE)
            pre_reset = load(x_reset, reset_at, t, cols, mask, STATE)
            operand = h.to(OPERAND)
            f = _sigmoid(tl.dot(operand, w_forget, pre_forget, input_precision="ieee", out_dtype=STATE), APPROXIMATE)
            r = _sigmoid(tl.dot(operand, w_reset, pre_reset, input_precision="ieee", out_dtype=STATE), APPROXIMATE)
            kept = r * h
        pre = load(x, x_at, t, cols, mask, STATE)
        pre = tl.dot(kept.to(OPERAND), w, pre, input_precision="ieee", out_dtype=STATE)
        z = tanh(pre, APPROXIMATE)
        if x_forget is not None:
            d_pre = (1 - f) * g * tanh_slope(pre, z, APPROXIMATE)
        else:
            d_pre = g * tanh_slope(pre, z, APPROXIMATE)
        d_pre = tl.where(mask, d_pre, 0.0)  # else what lies beside the sequences would reach dW
        operand = d_pre.to(GRADIENT)
        d_kept = tl.dot(operand, w_back, input_precision=PRECISION, out_dtype=STATE)
        dw = tl.dot(tl.trans(kept.to(GRADIENT)), operand, dw, input_precision=PRECISION, out_dtype=STATE)
        tl.store(dx_at + t * (dx.step >> 1) + cols * dx.channel, d_pre, mask=mask)
        before = d_kept
        if x_forget is not None:
            d_forget = tl.where(mask, g * (h - z) * f * (1 - f), 0.0)
            d_reset = tl.where(mask, d_kept * h * r * (1 - r), 0.0)
            tl.store(d_forget_at + t * (dx_forget.step >> 1) + cols * dx_forget.channel, d_forget, mask=mask)
            tl.store(d_reset_at + t * (dx_reset.step >> 1) + cols * dx_reset.channel, d_reset, mask=mask)
            states_t = tl.trans(h.to(GRADIENT))
            operand = d_forget.to(GRADIENT)
            before = tl.dot(operand, forget_back, f * g + r * d_kept, input_precision=PRECISION, out_dtype=STATE)
            dw_forget = tl.dot(states_t, operand, dw_forget, input_precision=PRECISION, out_dtype=STATE)
            operand = d_reset.to(GRADIENT)
            before = tl.dot(operand, reset_back, before, input_precision=PRECISION, out_dtype=STATE)
            dw_reset = tl.dot(states_t, operand, dw_reset, input_precision=PRECISION, out_dtype=STATE)
        carry = tl.where(mask, before, carry)
    tl.store(d_state + states, carry, mask=valid)
    i, j = tl.arange(0, V)[:, None], tl.arange(0, V)[None, :]
    inside, area = (i < units) & (j < units), units * units
    dw_at = d_weights + tl.program_id(0).to(tl.int64) * area + i * units + j  # [matrices, blocks, heads, V, V]
    tl.store(dw_at, dw, mask=inside)
    if x_forget is not None:
        programs = tl.num_programs(0).to(tl.int64)
        tl.store(dw_at + programs * area, dw_forget, mask=inside)
        tl.store(dw_at + 2 * programs * area, dw_reset, mask=inside)


def _view(x: Tensor) -> View:
    batch, step, head, channel = x.stride()
    return View(x, 2 * batch + 1, 2 * step + 1, 2 * head + 1, 3, channel)


def _views(tensors: list[Tensor]) -> list[View | None]:
    return [*map(_view, tensors), *[None] * (3 - len(tensors))]


class _Plan:
    """What follows from the problem: sizes, tiles and options of the kernels."""

    def __init__(self, problem: Problem):
        _, self.steps, self.heads, self.units = problem.inputs[0].shape
        self.sequences, self.dtype, self.output_dtype = problem.sequences, problem.state_dtype, problem.output_dtype
        self.weights = torch.stack([weight.to(self.dtype) for weight in problem.weights])
        cu_seqlens = problem.cu_seqlens
        offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.sizes = (offsets, self.sequences, self.steps, self.heads, self.units)
        self.blocks = triton.cdiv(self.sequences, ROWS)
        self.programs = self.blocks * self.heads if self.steps > 0 else 0

        half = self.output_dtype.itemsize == 2 and self.dtype == torch.float32
        operand = self.output_dtype if half else self.dtype
        if INTERPRETED and operand == torch.bfloat16:
            operand = torch.float32  # the interpreter has no matrix product in bfloat16
        width = max(SMALLEST_TILE, triton.next_power_of_2(self.units))
        self.options = {
            "R": ROWS,
            "V": width,
            "STATE": TRITON_DTYPES[self.dtype],
            "OPERAND": TRITON_DTYPES[operand],
            "APPROXIMATE": half and NVIDIA,
            "num_stages": 1,
            "num_warps": {16: 1, 32: 2}.get(width, 8) if half else 4 if width < 64 else 8,
        }
        narrow = operand == torch.float16  # which has not the range of gradients; TF32 has, and is as precise
        self.backward_options = {
            **self.options,
            "GRADIENT": tl.float32 if narrow else TRITON_DTYPES[operand],
            "PRECISION": "tf32" if narrow and NVIDIA else "ieee",
        }

    def new_state(self, value: Tensor | None, like: Tensor) -> Tensor:
        """A dense copy of a state, or zeros."""
        state = like.new_zeros((self.sequences, self.heads, self.units), dtype=self.dtype)
        return state if value is None else state.copy_(value)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    inputs, plan, y = problem.inputs, _Plan(problem), problem.new_y()
    state = plan.new_state(problem.initial_state, y)
    if plan.programs:
        with on_device_of(y):
            _forward_kernel[(plan.programs,)](
                *_views(inputs), plan.weights, _view(y), state, *plan.sizes, **plan.options
            )
    return y, state


def backward(problem: Problem, y: Tensor, dy: Tensor, d_final: Tensor | None) -> Gradients:
    inputs, weights, initial_state, _, state_clip = problem
    plan = _Plan(problem)
    d_state, initial = plan.new_state(d_final, y), plan.new_state(initial_state, y)
    clip = d_state.new_full((1,), torch.inf if state_clip is None else state_clip)
    d_inputs = [x.new_empty(x.shape) for x in inputs]
    shape = (len(weights), plan.blocks, *weights[0].shape)
    d_weights = d_state.new_zeros(shape) if plan.programs == 0 else d_state.new_empty(shape)
    if plan.programs:
        with on_device_of(y):
            _backward_kernel[(plan.programs,)](
                _view(dy), *_views(inputs), plan.weights, initial, _view(y), *_views(d_inputs), d_weights, d_state,
                clip, *plan.sizes, **plan.backward_options,
            )  # fmt: skip
    dw = [d.sum(0).to(weight.dtype) for d, weight in zip(d_weights, weights, strict=True)]
    return d_inputs, dw, None if initial_state is None else d_state.to(initial_state.dtype)
