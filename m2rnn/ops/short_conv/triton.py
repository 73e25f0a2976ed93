"""The kernels of the short convolution: one pass over memory forward, one backward.

Time is cut into segments. A row of a program's tile walks through one with the last inputs in registers, so each number
is loaded once, but for the few before a segment (backward, also behind it). Backward it computes a step's preactivation
again, and adds the step's gradient to the unfinished gradients of the inputs that the step saw. The gradients of weight
and bias are partial sums, one a program, added up in a fixed order: no atomics, the same bits every time.
"""
# Tuples that grow, which Triton unrolls, are not Python's:
# mypy: disable-error-code="assignment", no-warn-unreachable
# ruff: noqa: RUF005

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from m2rnn.ops.backends.triton import NVIDIA, on_device_of

CHANNELS = 64  # of a program: a row of its tile is a whole cache line in 16 bits
SEGMENT = 32  # steps that a row walks through
ROWS = 8  # of a program
WARPS = 4
LOADS, BACKWARD_LOADS = 8, 4  # steps whose numbers are loaded together, divisors of SEGMENT
# Numbers that the kernels are not compiled for; what divides a stride, which tells how wide a load may be, is apart
_GENERAL = ("batches", "steps", "channels", "x_batch", "x_step", "dy_batch", "dy_step")


@triton.jit
def _segments(program, blocks, batches, steps, L: tl.constexpr, R: tl.constexpr):
    """Of the segments in a program's rows [R]: batch row, first step, and steps from it on, 2 L at most."""
    segment, segments = program // blocks * R + tl.arange(0, R), tl.cdiv(steps, L)
    batch, first = segment // segments, segment % segments * L
    inside = batch < batches
    left = tl.minimum(tl.where(inside, steps - first, 0), 2 * L).to(tl.int32)
    return tl.where(inside, batch, 0), tl.where(inside, first, 0), left


@triton.jit
def _channels(vector, cols, inside, step: tl.constexpr):
    """A vector's values [1, C], or its first if they lie ``step`` apart, zeros where there is no channel."""
    return tl.load(vector + cols * step, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _rows(at, step, t, mask, inside):
    """Step t of the segments, zeros where ``mask`` [R] is false."""
    return tl.load(at + t * step, mask=mask[:, None] & inside[None, :], other=0.0)


@triton.jit
def _start(starts, first, t, left):
    """Where the sequences of step t start, counted from the segments' first steps."""
    start = left * 0
    if starts is not None:
        start = (tl.load(starts + first + t, mask=t < left, other=0) - first).to(tl.int32)
    return start


@triton.jit
def _sigmoid(z, FAST: tl.constexpr):
    if FAST:  # within 1e-6 relatively; the general exp and division spend three times as many instructions on extremes
        s = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1; add.ftz.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;",
            "=f,f", [z * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        s = 1 / (1 + tl.exp(-z))
    return s


@triton.jit
def _preactivation(past, x_t, t, start, taps, bias, W: tl.constexpr, PACKED: tl.constexpr):
    """What the taps see at step t, x at t - W + 1, ..., t with zeros before ``start``, and their sum."""
    seen, z = (), bias + tl.zeros_like(x_t)
    for tap in tl.static_range(W):
        x_tap = x_t
        if tap < W - 1:
            x_tap = past[tap]
            if PACKED:
                x_tap = tl.where((t - (W - 1 - tap) >= start)[:, None], x_tap, 0.0)
        z += taps[tap] * x_tap
        seen = seen + (x_tap,)
    return seen, z


@triton.jit
def _unfinished(
    sums, dy_t, z, t, start, taps, W: tl.constexpr, SILU: tl.constexpr, FAST: tl.constexpr, PACKED: tl.constexpr
):
    """The gradient of the pre-activation z at t, and those of x at t, ..., t - W + 1 from the steps up to t.

    ``sums`` holds those of x at t - 1, ..., t - W + 1 from the steps before.
    """
    dz = dy_t
    if SILU:
        s = _sigmoid(z, FAST)
        dz = dy_t * s * (1 + z * (1 - s))
    dx = (taps[W - 1] * dz,)
    for back in tl.static_range(1, W):
        part = dz
        if PACKED:
            part = tl.where((t - back >= start)[:, None], dz, 0.0)
        dx = dx + (sums[back - 1] + taps[W - 1 - back] * part,)
    return dz, dx


@triton.jit(do_not_specialize=_GENERAL)
def _forward_kernel(
    x, weight, bias, y, starts, batches, steps, channels, x_batch, x_step,
    W: tl.constexpr, L: tl.constexpr, R: tl.constexpr, G: tl.constexpr, C: tl.constexpr, SILU: tl.constexpr,
    FAST: tl.constexpr, X: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """y of R segments of L steps of C channels. Loads come G steps at a time, before these are computed."""
    PACKED: tl.constexpr = starts is not None
    program = tl.program_id(0).to(tl.int64)
    channels, x_batch, x_step = channels.to(tl.int64) * A, x_batch * X, x_step.to(tl.int64) * X
    blocks = tl.cdiv(channels, C)
    cols = program % blocks * C + tl.arange(0, C)
    inside = cols < channels
    batch, first, left = _segments(program, blocks, batches, steps, L, R)
    x_at = x + (batch * x_batch + first * x_step)[:, None] + cols[None, :]
    y_at = y + ((batch * steps + first) * channels)[:, None] + cols[None, :]

    taps, past, offset = (), (), tl.zeros([1, C], tl.float32)
    for tap in tl.static_range(W):
        taps = taps + (_channels(weight + tap, cols, inside, W),)
    for back in tl.static_range(W - 1, 0, -1):
        past = past + (_rows(x_at, x_step, -back, (first >= back) & (left > 0), inside).to(tl.float32),)
    if bias is not None:
        offset += _channels(bias, cols, inside, 1)
    for group in range(0, L, G):
        xs, begins = (), ()
        for i in tl.static_range(G):
            xs = xs + (_rows(x_at, x_step, group + i, group + i < left, inside),)
            begins = begins + (_start(starts, first, group + i, left),)
        for i in tl.static_range(G):
            t = group + i
            seen, z = _preactivation(past, xs[i].to(tl.float32), t, begins[i], taps, offset, W, PACKED)
            if SILU:
                z *= _sigmoid(z, FAST)
            tl.store(y_at + t * channels, z, mask=(t < left)[:, None] & inside[None, :])
            past = seen[1:]


@triton.jit(do_not_specialize=_GENERAL)
def _backward_kernel(
    dy, x, weight, bias, dx, partial, starts, batches, steps, channels, dy_batch, dy_step, x_batch, x_step,
    W: tl.constexpr, L: tl.constexpr, R: tl.constexpr, G: tl.constexpr, C: tl.constexpr, SILU: tl.constexpr,
    FAST: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """The gradient of x in the same segments, and these segments' part of the gradients of weight and bias."""
    BIASED: tl.constexpr = bias is not None
    PACKED: tl.constexpr = starts is not None
    program = tl.program_id(0).to(tl.int64)
    channels, x_batch, x_step = channels.to(tl.int64) * A, x_batch * X, x_step.to(tl.int64) * X
    dy_batch, dy_step = dy_batch * Y, dy_step.to(tl.int64) * Y
    blocks = tl.cdiv(channels, C)
    cols = program % blocks * C + tl.arange(0, C)
    inside = cols < channels
    batch, first, left = _segments(program, blocks, batches, steps, L, R)
    x_at = x + (batch * x_batch + first * x_step)[:, None] + cols[None, :]
    dy_at = dy + (batch * dy_batch + first * dy_step)[:, None] + cols[None, :]
    dx_at = dx + ((batch * steps + first) * channels)[:, None] + cols[None, :]

    taps, past, offset = (), (), tl.zeros([1, C], tl.float32)
    d_taps, sums, d_bias = (), (), tl.zeros([R, C], tl.float32)
    for tap in tl.static_range(W):
        taps = taps + (_channels(weight + tap, cols, inside, W),)
        d_taps = d_taps + (tl.zeros([R, C], tl.float32),)
    for back in tl.static_range(W - 1, 0, -1):
        past = past + (_rows(x_at, x_step, -back, (first >= back) & (left > 0), inside).to(tl.float32),)
        sums = sums + (tl.zeros([R, C], tl.float32),)
    if BIASED:
        offset += _channels(bias, cols, inside, 1)
    for group in range(0, L, G):
        xs, dys, begins = (), (), ()
        for i in tl.static_range(G):
            xs = xs + (_rows(x_at, x_step, group + i, group + i < left, inside),)
            dys = dys + (_rows(dy_at, dy_step, group + i, group + i < left, inside),)
            begins = begins + (_start(starts, first, group + i, left),)
        for i in tl.static_range(G):
            t = group + i
            seen, z = _preactivation(past, xs[i].to(tl.float32), t, begins[i], taps, offset, W, PACKED)
            dz, d_seen = _unfinished(sums, dys[i].to(tl.float32), z, t, begins[i], taps, W, SILU, FAST, PACKED)
            whole = t - (W - 1)  # no later step sees it
            mask = (whole >= 0) & (whole < left)
            tl.store(dx_at + whole * channels, d_seen[W - 1], mask=mask[:, None] & inside[None, :])
            added = ()
            for tap in tl.static_range(W):
                added = added + (d_taps[tap] + dz * seen[tap],)
            d_taps, past, sums = added, seen[1:], d_seen[: W - 1]
            if BIASED:
                d_bias += dz
    for t in tl.static_range(L, L + W - 1):  # what the next segment's first steps add
        start = _start(starts, first, t, left)
        x_t = _rows(x_at, x_step, t, t < left, inside).to(tl.float32)
        dy_t = _rows(dy_at, dy_step, t, t < left, inside).to(tl.float32)
        seen, z = _preactivation(past, x_t, t, start, taps, offset, W, PACKED)
        dz, d_seen = _unfinished(sums, dy_t, z, t, start, taps, W, SILU, FAST, PACKED)
        mask = t - (W - 1) < left
        tl.store(dx_at + (t - (W - 1)) * channels, d_seen[W - 1], mask=mask[:, None] & inside[None, :])
        past, sums = seen[1:], d_seen[: W - 1]

    partial_at = partial + program // blocks * (W + BIASED) * channels + cols
    for tap in tl.static_range(W):
        tl.store(partial_at + tap * channels, tl.sum(d_taps[tap], 0), mask=inside)
    if BIASED:
        tl.store(partial_at + W * channels, tl.sum(d_bias, 0), mask=inside)


def _divisor(x: Tensor, *numbers: int) -> int:
    """The largest power of two that divides these numbers of elements, up to a vector of 16 bytes."""
    return math.gcd(16 // x.itemsize, *numbers)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch and time as multiples of a divisor, and that divisor."""
    batch, step, _ = x.stride()
    divisor = _divisor(x, batch, step)
    return batch // divisor, step // divisor, divisor


def _readable(x: Tensor) -> Tensor:
    """The same tensor, with neighbouring channels side by side."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _launch(x: Tensor) -> tuple[int, int]:
    """Programs along time and along the channels."""
    batches, steps, channels = x.shape
    if x.numel() == 0:
        return 0, 0
    return triton.cdiv(batches * triton.cdiv(steps, SEGMENT), ROWS), triton.cdiv(channels, CHANNELS)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, silu: bool) -> Tensor:
    """y [B, T, C] in the dtype of x."""
    y, x, (batches, steps, channels) = x.new_empty(x.shape), _readable(x), x.shape
    spans, blocks = _launch(x)
    if spans:
        x_batch, x_step, x_divisor = _strides(x)
        divisor = _divisor(x, channels)
        with on_device_of(x):
            _forward_kernel[(spans * blocks,)](
                x, weight.contiguous(), _dense(bias), y, _dense(starts),
                batches, steps, channels // divisor, x_batch, x_step,
                W=weight.shape[1], L=SEGMENT, R=ROWS, G=LOADS, C=CHANNELS, SILU=silu, FAST=NVIDIA,
                X=x_divisor, A=divisor, num_warps=WARPS,
            )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and bias, in the dtypes of these."""
    dx, x, dy, (batches, steps, channels) = x.new_empty(x.shape), _readable(x), _readable(dy), x.shape
    taps, (spans, blocks) = weight.shape[1], _launch(x)
    partial = x.new_empty((spans, taps + (bias is not None), channels), dtype=torch.float32)
    if spans:
        x_batch, x_step, x_divisor = _strides(x)
        dy_batch, dy_step, dy_divisor = _strides(dy)
        divisor = _divisor(x, channels)
        with on_device_of(x):
            _backward_kernel[(spans * blocks,)](
                dy, x, weight.contiguous(), _dense(bias), dx, partial, _dense(starts),
                batches, steps, channels // divisor, dy_batch, dy_step, x_batch, x_step,
                W=taps, L=SEGMENT, R=ROWS, G=BACKWARD_LOADS, C=CHANNELS, SILU=silu, FAST=NVIDIA,
                X=x_divisor, Y=dy_divisor, A=divisor, num_warps=WARPS,
            )  # fmt: skip
    total = partial.sum(0)
    d_weight = total[:taps].t().contiguous().to(weight.dtype)
    return dx, d_weight, None if bias is None else total[taps].to(bias.dtype, copy=True)
