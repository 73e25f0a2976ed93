"""Triton kernels for every head count, length and dtype that ``m2rnn_scan`` takes.

A program takes a block of rows of one head of one sequence through time, its state in registers: rows never mix.
What several programs add to (a gradient of shared heads, or y where the rows of a head are cut into blocks) goes into
partial sums, one slot a program, that a second kernel adds up in a fixed order: no atomics, the same bits every time.

Memory beyond inputs, outputs and gradients is bounded, whatever the batch and the length: a launch covers as many
sequences as there is scratch for, and as long a span of time as there is room for partial sums. The state, or the
gradient that goes back through it, passes from one span to the next in global memory.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

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
from m2rnn.ops.scan.problem import Gradients, Problem
from m2rnn.ops.scan.triton import CHUNK

SCRATCH_BYTES = 96 << 20  # for the recomputed states of all programs of a launch
PARTIAL_BYTES = 128 << 20  # for the partial sums of a launch

# Arguments whose values the kernels are not compiled for: else each length, stride and head count compiles anew.
_GENERAL = (
    *("dy", "q", "k", "v", "f", "weight", "initial", "y", "dq", "dk", "dv", "df", "terms", "out_heads", "channels"),
    *("offsets", "steps", "heads", "key_dim", "value_dim", "first", "begin", "span"),
)


class _Target(NamedTuple):
    """Where results go: a dense tensor [B, T, H, channels], or partial sums [sequence, step, H, slots, channels].

    Integers as in ``View``; ``kind`` is 2 for the tensor, 3 for partial sums.
    """

    data: Tensor
    channels: int
    slots: int
    kind: int


# -------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _preactivation(h, w, k, v, valid, PADDED: tl.constexpr, OPERAND: tl.constexpr):
    x = tl.dot(h.to(OPERAND), w, k[:, None] * v[None, :], input_precision="ieee", out_dtype=h.dtype)
    if PADDED:  # an infinite k or v times a zero of the padding is NaN
        x = tl.where(valid, x, 0.0)
    return x


@triton.jit
def _sequence(n, offsets, steps, CHUNK: tl.constexpr):
    """Of sequence n: batch row, first step, length, index of its first saved state."""
    if offsets is None:
        batch, first, length = n, n * 0, steps + n * 0
        saved = n * tl.maximum(tl.cdiv(length, CHUNK) - 1, 0)
    else:  # inside memory even if they were not checked
        batch = n * 0
        first = tl.minimum(tl.maximum(tl.load(offsets + n).to(tl.int64), 0), steps)
        length = tl.minimum(tl.load(offsets + n + 1).to(tl.int64), steps) - first
        saved = first // CHUNK
    return batch, first, length, saved


@triton.jit
def _into(x, row, partial_row, head, heads, block):
    """Where a ``_Target`` has the channels of a step: row ``row`` of B · T, or ``partial_row`` of the launch's."""
    row = tl.where(x.kind == 3, partial_row, row)
    return x.data + ((row * heads + head) * (x.slots >> 1) + block % (x.slots >> 1)) * (x.channels >> 1)


@triton.jit
def _stride(x, heads):
    """From one step to the next in a ``_Target``."""
    return heads * (x.slots >> 1) * (x.channels >> 1)


@triton.jit(do_not_specialize=_GENERAL)
def _forward_kernel(
    q, k, v, f, weight, y, state, saved, offsets, steps, heads, key_dim, value_dim, first, begin, span,
    CHUNK: tl.constexpr, R: tl.constexpr, V: tl.constexpr, PADDED: tl.constexpr, STATE: tl.constexpr,
    OPERAND: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """R rows of a head, from step ``begin`` of the sequence for ``span`` steps: y, saved states, the state in place."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(key_dim, R)
    block, head, index = program % blocks, program // blocks % heads, program // blocks // heads
    batch, start, length, saved_first = _sequence(first + index, offsets, steps, CHUNK)
    if length <= begin:
        return
    last, token = tl.minimum(length - begin, span) - 1, start + begin

    value_dim = value_dim if PADDED else V  # known to the compiler, which then moves whole vectors
    rows, cols = block * R + tl.arange(0, R).to(tl.int64), tl.arange(0, V).to(tl.int64)
    in_rows, in_cols = rows < key_dim, cols < value_dim
    valid = in_rows[:, None] & in_cols[None, :]
    area, tile = key_dim * value_dim, rows[:, None] * value_dim + cols[None, :]
    w_at, in_w = (
        place(weight, 0, 0, head) + cols[:, None] * (weight.step >> 1),
        (cols < value_dim)[:, None] & in_cols[None, :],
    )
    w = load(weight, w_at, 0, cols[None, :], in_w, STATE).to(OPERAND)
    state_at = state + ((first + index) * heads + head) * area + tile
    h = tl.load(state_at, mask=valid, other=0.0)

    q_at, k_at = place(q, batch, token, head), place(k, batch, token, head)
    v_at, f_at = place(v, batch, token, head), place(f, batch, token, head)
    y_at = _into(y, batch * steps + token, index * span, head, heads, block) + cols
    y_step = _stride(y, heads)
    next_q, next_k = load(q, q_at, 0, rows, in_rows, STATE), load(k, k_at, 0, rows, in_rows, STATE)
    next_v, next_f = load(v, v_at, 0, cols, in_cols, STATE), tl.load(f_at).to(STATE)
    for i in range(last + 1):
        if saved is not None and ((begin + i) % CHUNK == 0) & (begin + i > 0):
            chunk = saved_first + (begin + i) // CHUNK - 1
            tl.store(saved + (chunk * heads + head) * area + tile, h, mask=valid)
        q_t, k_t, v_t, f_t = next_q, next_k, next_v, next_f
        j = tl.minimum(i + 1, last)  # loaded while this step is computed
        next_q, next_k = load(q, q_at, j, rows, in_rows, STATE), load(k, k_at, j, rows, in_rows, STATE)
        next_v, next_f = load(v, v_at, j, cols, in_cols, STATE), tl.load(f_at + j * (f.step >> 1)).to(STATE)
        z = tanh(_preactivation(h, w, k_t, v_t, valid, PADDED, OPERAND), APPROXIMATE)
        h = f_t * h + (1 - f_t) * z
        tl.store(y_at + i * y_step, tl.sum(q_t[:, None] * h, 0), mask=in_cols)
    tl.store(state_at, h, mask=valid)


@triton.jit(do_not_specialize=_GENERAL)
def _backward_kernel(
    dy, q, k, v, f, weight, initial, saved, clip, scratch, dq, dk, dv, df, d_state, d_weight,
    offsets, steps, heads, key_dim, value_dim, first, begin, span,
    CHUNK: tl.constexpr, R: tl.constexpr, V: tl.constexpr, PADDED: tl.constexpr, STATE: tl.constexpr,
    OPERAND: tl.constexpr, APPROXIMATE: tl.constexpr, GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same rows and steps back: all gradients; those of the state and the weight are read and written in place."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(key_dim, R)
    block, head, index = program % blocks, program // blocks % heads, program // blocks // heads
    batch, start, length, saved_first = _sequence(first + index, offsets, steps, CHUNK)
    if length <= begin:
        return
    chunks = tl.cdiv(tl.minimum(length - begin, span), CHUNK)

    value_dim = value_dim if PADDED else V  # known to the compiler, which then moves whole vectors
    rows, cols = block * R + tl.arange(0, R).to(tl.int64), tl.arange(0, V).to(tl.int64)
    in_rows, in_cols = rows < key_dim, cols < value_dim
    valid = in_rows[:, None] & in_cols[None, :]
    area, tile = key_dim * value_dim, rows[:, None] * value_dim + cols[None, :]
    w_at, in_w = (
        place(weight, 0, 0, head) + cols[:, None] * (weight.step >> 1),
        (cols < value_dim)[:, None] & in_cols[None, :],
    )
    w = load(weight, w_at, 0, cols[None, :], in_w, STATE).to(OPERAND)
    wt_at = place(weight, 0, 0, head) + cols[None, :] * (weight.step >> 1)
    w_transposed = load(weight, wt_at, 0, cols[:, None], in_w, STATE).to(GRADIENT)
    limit = tl.load(clip)

    state_at = d_state + ((first + index) * heads + head) * area + tile
    carry = tl.load(state_at, mask=valid, other=0.0)
    dw_at = d_weight + program * value_dim * value_dim + cols[:, None] * value_dim + cols[None, :]
    dw = tl.load(dw_at, mask=in_w, other=0.0)
    scratch_at = scratch + program * (CHUNK * R * V) + tl.arange(0, R)[:, None] * V + tl.arange(0, V)[None, :]
    row_step, v_step, f_step = _stride(dq, heads), _stride(dv, heads), _stride(df, heads)

    for reverse in range(chunks):
        skip = begin + (chunks - 1 - reverse) * CHUNK
        last, token = tl.minimum(length - skip, CHUNK) - 1, start + skip
        q_at, k_at = place(q, batch, token, head), place(k, batch, token, head)
        v_at, f_at = place(v, batch, token, head), place(f, batch, token, head)
        dy_at = place(dy, batch, token, head)
        row, partial_row = batch * steps + token, index * span + skip - begin
        dq_at = _into(dq, row, partial_row, head, heads, block) + rows
        dk_at = _into(dk, row, partial_row, head, heads, block) + rows
        dv_at = _into(dv, row, partial_row, head, heads, block) + cols
        df_at = _into(df, row, partial_row, head, heads, block)

        # Forward through the chunk again, keeping its states. They may be rounded: so dq, which needs them, comes here.
        if skip == 0:
            h_at = place(initial, first + index, 0, head) + rows[:, None] * (initial.step >> 1)
            h = load(initial, h_at, 0, cols[None, :], valid, STATE)
        else:
            chunk = saved_first + skip // CHUNK - 1
            h = tl.load(saved + (chunk * heads + head) * area + tile, mask=valid, other=0.0)
        next_k, next_v = load(k, k_at, 0, rows, in_rows, STATE), load(v, v_at, 0, cols, in_cols, STATE)
        next_f, next_dy = tl.load(f_at).to(STATE), load(dy, dy_at, 0, cols, in_cols, STATE)
        for i in range(last + 1):
            tl.store(scratch_at + i * (R * V), h.to(OPERAND))
            k_t, v_t, f_t, dy_t = next_k, next_v, next_f, next_dy
            j = tl.minimum(i + 1, last)
            next_k, next_v = load(k, k_at, j, rows, in_rows, STATE), load(v, v_at, j, cols, in_cols, STATE)
            next_f, next_dy = tl.load(f_at + j * (f.step >> 1)).to(STATE), load(dy, dy_at, j, cols, in_cols, STATE)
            z = tanh(_preactivation(h, w, k_t, v_t, valid, PADDED, OPERAND), APPROXIMATE)
            h = f_t * h + (1 - f_t) * z
            tl.store(dq_at + i * row_step, tl.sum(h * dy_t[None, :], 1), mask=in_rows)
        tl.debug_barrier()  # the program's other threads read what these wrote

        next_q, next_k = load(q, q_at, last, rows, in_rows, STATE), load(k, k_at, last, rows, in_rows, STATE)
        next_v, next_dy = load(v, v_at, last, cols, in_cols, STATE), load(dy, dy_at, last, cols, in_cols, STATE)
        next_f, next_h = tl.load(f_at + last * (f.step >> 1)).to(STATE), tl.load(scratch_at + last * (R * V))
        for step in range(last + 1):
            i = last - step
            q_t, k_t, v_t, dy_t, f_t, h_t = next_q, next_k, next_v, next_dy, next_f, next_h
            j = tl.maximum(i - 1, 0)
            next_q, next_k = load(q, q_at, j, rows, in_rows, STATE), load(k, k_at, j, rows, in_rows, STATE)
            next_v, next_dy = load(v, v_at, j, cols, in_cols, STATE), load(dy, dy_at, j, cols, in_cols, STATE)
            next_f, next_h = tl.load(f_at + j * (f.step >> 1)).to(STATE), tl.load(scratch_at + j * (R * V))

            h = h_t.to(STATE)  # H_{t-1}
            x = _preactivation(h, w, k_t, v_t, valid, PADDED, OPERAND)
            z = tanh(x, APPROXIMATE)
            carry = tl.clamp(carry, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
            g = q_t[:, None] * dy_t[None, :] + carry
            dx = (1 - f_t) * g * tanh_slope(x, z, APPROXIMATE)
            operand = dx.to(GRADIENT)
            carry = tl.dot(operand, w_transposed, f_t * g, input_precision=PRECISION, out_dtype=STATE)
            dw = tl.dot(tl.trans(h_t.to(GRADIENT)), operand, dw, input_precision=PRECISION, out_dtype=STATE)
            tl.store(dk_at + i * row_step, tl.sum(dx * v_t[None, :], 1), mask=in_rows)
            tl.store(dv_at + i * v_step, tl.sum(dx * k_t[:, None], 0), mask=in_cols)
            tl.store(df_at + i * f_step, tl.sum(g * (h - z)))
        tl.debug_barrier()
    tl.store(state_at, carry, mask=valid)
    tl.store(dw_at, dw, mask=in_w)


@triton.jit(do_not_specialize=_GENERAL)
def _sum_kernel(
    partial, out, terms, out_heads, channels, offsets, steps, first, begin, span,
    CHUNK: tl.constexpr, S: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """One step and head of a result [B, T, out_heads, channels]: the sum of its ``terms`` partial sums."""
    program = tl.program_id(0).to(tl.int64)
    head, row = program % out_heads, program // out_heads
    i, index = row % span, row // span
    batch, start, length, _ = _sequence(first + index, offsets, steps, CHUNK)
    if length <= begin + i:
        return
    slots, cols = tl.arange(0, S), tl.arange(0, X)
    at = partial + program * terms * channels
    total = tl.zeros([X], partial.dtype.element_ty)
    for term in range(0, terms, S):
        mask = (term + slots < terms)[:, None] & (cols < channels)[None, :]
        total += tl.sum(tl.load(at + (term + slots)[:, None] * channels + cols[None, :], mask=mask, other=0.0), 0)
    out_at = out + ((batch * steps + start + begin + i) * out_heads + head) * channels + cols
    tl.store(out_at, total, mask=cols < channels)


# ------------------------------------------------------------------------------------------------------- launches


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class _Plan:
    """What follows from the problem: sizes, tiles and options of the kernels, and how the work is cut into plan."""

    def __init__(self, problem: Problem):
        q, k, v, f, weight, _, cu_seqlens, _ = problem
        self.heads, self.steps, self.sequences = problem.heads, problem.steps, problem.sequences
        self.key_dim, self.value_dim = problem.key_dim, problem.value_dim
        self.offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.dtype, self.output_dtype = problem.state_dtype, problem.output_dtype
        self.inputs = (*(self.view(x) for x in (q, k, v, f)), self.view(weight.transpose(0, 1)[None]))
        self.sizes = (self.offsets, self.steps, self.heads, self.key_dim, self.value_dim)

        half = self.output_dtype.itemsize == 2 and self.dtype == torch.float32
        self.width = max(SMALLEST_TILE, triton.next_power_of_2(self.value_dim))
        most = (2048 if half else 1024 if self.dtype == torch.float32 else 256) // self.width
        self.rows = max(SMALLEST_TILE, min(triton.next_power_of_2(self.key_dim), most))
        if half:  # one warp for 1024 elements: it needs no barrier, and a step of 64 × 16 keeps its tanh unit busy
            if self.width == SMALLEST_TILE and self.sequences * self.heads <= 2 * _multiprocessors(q.device):
                self.rows = SMALLEST_TILE  # few heads: a step's latency counts, and shorter columns have less of it
            self.warps = max(self.rows * self.width // 1024, self.width // 32, 1)
        else:
            self.warps = 4 if self.width < 64 else 8
        self.blocks = triton.cdiv(self.key_dim, self.rows)

        operand = self.output_dtype if half else self.dtype
        if INTERPRETED and operand == torch.bfloat16:
            operand = torch.float32  # the interpreter has no matrix product in bfloat16
        self.operand = operand
        self.options = {
            "CHUNK": CHUNK,
            "R": self.rows,
            "V": self.width,
            "PADDED": self.key_dim % self.rows > 0 or self.value_dim < self.width,
            "STATE": TRITON_DTYPES[self.dtype],
            "OPERAND": TRITON_DTYPES[operand],
            "APPROXIMATE": half and NVIDIA,
            "num_stages": 1,
        }
        # float16 has not the range of gradients: there the products are in TF32, as precise and as wide as float32
        narrow = operand == torch.float16
        self.backward_options = {
            **self.options,
            "GRADIENT": tl.float32 if narrow else TRITON_DTYPES[operand],
            "PRECISION": "tf32" if narrow and NVIDIA else "ieee",
        }

    def view(self, x: Tensor) -> View:
        batch, step, head, channel = (*x.stride(), 0)[:4]
        repeat = self.heads // x.shape[2]
        return View(x, 2 * batch + 1, 2 * step + 1, 2 * head + 1, 2 * repeat + 1, channel)

    def new_state(self, value: Tensor | None, like: Tensor) -> Tensor:
        """A dense copy of a state, or zeros."""
        shape = (self.sequences, self.heads, self.key_dim, self.value_dim)
        state = like.new_zeros(shape, dtype=self.dtype)
        return state if value is None else state.copy_(value)

    def launches(self, most: int, outputs: list["_Output"], *, backward: bool = False) -> Iterator[tuple[int, ...]]:
        """``(programs, first sequence, first step, steps)`` of each launch, of ``most`` sequences at a time.

        The partial sums of a launch are added up after it.
        """
        if self.sequences == 0 or self.steps == 0:
            return
        count = triton.cdiv(self.sequences, triton.cdiv(self.sequences, most))
        span, longest = self.steps, self.steps
        if bytes_a_step := count * sum(output.bytes_a_step for output in outputs):
            span = max(PARTIAL_BYTES // bytes_a_step, CHUNK) // CHUNK * CHUNK
            if span < self.steps and self.offsets is not None and not _is_capturing(self.offsets):
                longest = int(self.offsets.diff().max())
            span = min(span, longest)
            for output in outputs:
                output.allocate(count * span)
        for first in range(0, self.sequences, count):
            n = min(count, self.sequences - first)
            begins = range(0, longest, span)
            for begin in reversed(begins) if backward else begins:
                yield n * self.heads * self.blocks, first, begin, span
                for output in outputs:
                    output.add_up(n, first, begin, span)


class _Output:
    """A result [B, T, heads, channels], written in place, or by way of partial sums if several programs add to it."""

    def __init__(self, plan: _Plan, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, slots: int = 1):
        self.plan, self.slots = plan, slots
        self.result = like.new_empty(shape, dtype=dtype)
        self.channels = shape[3] if len(shape) == 4 else 1
        self.terms = plan.heads // shape[2] * slots
        self.partial: Tensor | None = None

    @property
    def bytes_a_step(self) -> int:
        return self.terms * self.result.shape[2] * self.channels * self.plan.dtype.itemsize if self.terms > 1 else 0

    def allocate(self, rows: int) -> None:
        if self.terms > 1:
            shape = (rows, self.plan.heads, self.slots, self.channels)
            self.partial = self.result.new_empty(shape, dtype=self.plan.dtype)

    @property
    def target(self) -> _Target:
        data = self.result if self.partial is None else self.partial
        return _Target(data, 2 * self.channels + 1, 2 * self.slots + 1, 2 if self.partial is None else 3)

    def add_up(self, sequences: int, first: int, begin: int, span: int) -> None:
        if self.partial is None:
            return
        heads, width = self.result.shape[2], triton.next_power_of_2(self.channels)
        _sum_kernel[(sequences * span * heads,)](
            self.partial, self.result, self.terms, heads, self.channels, self.plan.offsets, self.plan.steps,
            first, begin, span, CHUNK=CHUNK, S=max(1, 1024 // width), X=width,
            num_warps=1 if width <= 1024 else 4,
        )  # fmt: skip


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def forward(problem: Problem, saved: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(y, final state, saved)``, the states between chunks written to ``saved``."""
    q = problem.q
    plan = _Plan(problem)
    state = plan.new_state(problem.initial_state, q)
    y = _Output(plan, q, problem.y_shape, problem.output_dtype, plan.blocks)
    with on_device_of(q):
        for programs, *part in plan.launches(problem.sequences, [y]):
            _forward_kernel[(programs,)](
                *plan.inputs, y.target, state, saved, *plan.sizes, *part,
                **plan.options, num_warps=plan.warps,
            )  # fmt: skip
    return y.result, state, saved


def backward(problem: Problem, saved: Tensor, dy: Tensor, d_final: Tensor | None) -> Gradients:
    q, k, v, f, weight, initial_state, _, state_clip = problem
    plan = _Plan(problem)
    heads, blocks, width = plan.heads, plan.blocks, plan.width
    d_state = plan.new_state(d_final, q)
    initial = d_state.new_zeros(()).expand(d_state.shape) if initial_state is None else initial_state
    clip = d_state.new_full((1,), torch.inf if state_clip is None else state_clip)
    dq, dk = (_Output(plan, x, x.shape, x.dtype) for x in (q, k))
    dv, df = (_Output(plan, x, x.shape, x.dtype, blocks) for x in (v, f))

    scratch_shape = (CHUNK, plan.rows, width)
    bytes_a_sequence = heads * blocks * math.prod(scratch_shape) * plan.operand.itemsize
    most = min(max(SCRATCH_BYTES // bytes_a_sequence, 1), plan.sequences)
    scratch = q.new_empty((most * heads * blocks, *scratch_shape), dtype=plan.operand)
    d_weight = d_state.new_zeros((most, weight.shape[0], heads // weight.shape[0] * blocks, *weight.shape[1:]))
    with on_device_of(q):
        for programs, *part in plan.launches(most, [dq, dk, dv, df], backward=True):
            _backward_kernel[(programs,)](
                plan.view(dy), *plan.inputs, plan.view(initial.transpose(1, 2)), saved, clip, scratch,
                dq.target, dk.target, dv.target, df.target, d_state, d_weight, *plan.sizes, *part,
                **plan.backward_options, num_warps=plan.warps,
            )  # fmt: skip
    dw = d_weight.sum((0, 2)).to(weight.dtype)
    d_initial = None if initial_state is None else d_state.to(initial_state.dtype)
    return dq.result, dk.result, dv.result, df.result, dw, d_initial
