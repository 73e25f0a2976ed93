"""The compiled loops of the CPU backend; ``cpu.py`` plans the work and calls them.

A *unit* of work is a range of sequences, heads and state rows that one thread takes from the first step to the last.
Within a unit, ``chunk`` time steps at a time are copied into small dense arrays ("staged"): that is where strides,
16-bit dtypes and padding are dealt with, so that the arithmetic sees aligned rows of whole vectors only. V is padded
to whole vectors and the rows to blocks of four with zeros, which stay zero through the recurrence.

Tensors of any dtype arrive as rows of ``tensors``: see the columns below. Everything the arithmetic needs in order
to be the same bits for any number of threads is fixed by the shapes: units, their order, and who adds to what.
"""

import hashlib
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import njit

from m2rnn.ops import simd
from m2rnn.ops.simd import element, fma, load, put, store, tanh, total, zeros_like

# Columns of ``tensors``, all integers: the address of element 0, the dtype's code, strides in elements, how many heads
# share one of the tensor's, whether the channels are the state's rows (else: how many there are, and padded), and for
# outputs whether to add to what is there and how partial sums are numbered (see ``_unstage``).
(
    ADDRESS, DTYPE, SLOT, BATCH, TIME, HEAD, CHANNEL, REPEAT, BY_ROW, CHANNELS, PADDED, ADD, HEAD_SLOTS, ROW_SLOTS,
) = range(14)  # fmt: skip
# Rows of ``tensors``. The forward pass uses the first five; in the backward pass Y is the gradient of y.
Q, K, V, F, Y, DQ, DK, DV, DF = range(9)
# Columns of ``units``: ranges [first, last), and the unit's place among those that split rows and heads
FIRST_SEQUENCE, LAST_SEQUENCE, FIRST_HEAD, LAST_HEAD, FIRST_ROW, LAST_ROW, ROW_BLOCK, HEAD_GROUP = range(8)
# Columns of ``sequences``: where a sequence lies, and the number of its first saved state
BATCH_INDEX, START, LENGTH, FIRST_SAVED = range(4)
# Entries of ``sizes``
HEADS, KEY_DIM, VALUE_DIM, WIDTH, CHUNK, WEIGHT_REPEAT = range(6)

ROWS = 4  # state rows that one block of accumulators covers
FLOAT32, FLOAT64, BFLOAT16 = simd.FLOAT32, simd.FLOAT64, simd.BFLOAT16
VECTOR_BYTES = simd.VECTOR_BYTES


def _aligned_zeros(sizes: list[int], dtype: Any) -> list[np.ndarray]:
    """Arrays of the given sizes, each on a cache line of its own: vectors that straddle two lines cost twice."""
    lanes = VECTOR_BYTES // np.dtype(dtype).itemsize
    starts = np.cumsum([0, *(-(-size // lanes) * lanes for size in sizes)]).tolist()
    memory = np.zeros(starts[-1] + lanes, dtype)
    shift = -memory.ctypes.data % VECTOR_BYTES // memory.itemsize
    return [memory[shift + start : shift + start + size] for start, size in zip(starts[:-1], sizes, strict=True)]


class Scratch(NamedTuple):
    """Dense arrays for one chunk of one head; ``rows`` and ``width`` are padded. The forward pass leaves d… empty."""

    q: np.ndarray  # [chunk, rows]
    k: np.ndarray  # [chunk, rows]
    v: np.ndarray  # [chunk, width]
    f: np.ndarray  # [chunk]
    y: np.ndarray  # [chunk, width]: y, or its gradient
    states: np.ndarray  # [chunk + 1, rows, width]: H before each step and after the last; forward: [rows, width]
    updates: np.ndarray  # [chunk, rows, width]: Z, which dX replaces on the way back; forward: [rows, width]
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    df: np.ndarray
    carry: np.ndarray  # [rows, width]: the gradient that reaches the state from later steps
    d_weight: np.ndarray  # [width, width]

    @classmethod
    def allocate(cls, chunk: int, rows: int, width: int, dtype: Any, backward: bool) -> "Scratch":
        state = rows * width
        sizes = [chunk * rows, chunk * rows, chunk * width, chunk, chunk * width]
        sizes += [(chunk + 1) * state, chunk * state] if backward else [state, state]
        gradients = [chunk * rows, chunk * rows, chunk * width, chunk, state, width * width]
        sizes += gradients if backward else [0] * len(gradients)
        return cls(*_aligned_zeros(sizes, dtype))


def _cache_folder() -> Path | None:
    """Where compiled kernels are kept: a folder for this very source, since numba looks at one file's date only."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m2rnn"
    sources = [Path(simd.__file__), Path(__file__)]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    folder = Path(numba.config.CACHE_DIR or default) / f"cpu-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        warnings.warn(
            f"m2rnn cannot keep its compiled CPU kernels in {folder} ({error.strerror}): every process compiles them "
            "anew, which takes some seconds. Set NUMBA_CACHE_DIR to a folder that can be written.",
            stacklevel=2,
        )
        return None


_CACHE_FOLDER = _cache_folder()


def _jit(function: Any) -> Any:
    if _CACHE_FOLDER is None:
        return njit(nogil=True, error_model="numpy")(function)
    previous, numba.config.CACHE_DIR = (
        numba.config.CACHE_DIR,
        str(_CACHE_FOLDER),
    )  # read when a function is declared
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    finally:
        numba.config.CACHE_DIR = previous


def _inline(function: Any) -> Any:
    return njit(nogil=True, error_model="numpy", forceinline=True)(function)


def _call(function: Any) -> Any:
    """Not inlined: compiled once, which halves the time of a first call."""
    return njit(nogil=True, error_model="numpy")(function)


@_inline
def _place(tensor, unit):
    """(first channel, channels, padded channels, bytes an element) of a tensor's part that belongs to a unit."""
    first, count, width = 0, tensor[CHANNELS], tensor[PADDED]
    if tensor[BY_ROW]:
        first, count = unit[FIRST_ROW], unit[LAST_ROW] - unit[FIRST_ROW]
        width = (count + ROWS - 1) // ROWS * ROWS
    dtype = tensor[DTYPE]
    return first, count, width, 4 if dtype == FLOAT32 else 8 if dtype == FLOAT64 else 2


@_call
def _stage(out, tensor, unit, batch, start, steps, head):
    """Copy ``steps`` time steps of one head into ``out``, converted and padded with zeros."""
    first, count, width, size = _place(tensor, unit)
    dtype, stride = tensor[DTYPE], size * tensor[CHANNEL]
    origin = batch * tensor[BATCH] + head // tensor[REPEAT] * tensor[HEAD] + first * tensor[CHANNEL]
    for t in range(steps):
        address = tensor[ADDRESS] + size * (origin + (start + t) * tensor[TIME])
        to = t * width
        if dtype == FLOAT32:
            for i in range(count):
                put(out, to + i, simd.read_float32(address + i * stride))
        elif dtype == FLOAT64:
            for i in range(count):
                put(out, to + i, simd.read_float64(address + i * stride))
        elif dtype == BFLOAT16:
            for i in range(count):
                put(out, to + i, simd.read_bfloat16(address + i * stride))
        else:
            for i in range(count):
                put(out, to + i, simd.read_float16(address + i * stride))
        for i in range(count, width):
            put(out, to + i, 0.0)


@_call
def _unstage(out, tensor, unit, batch, start, steps, head):
    """Write ``steps`` time steps of one head from ``out``, the inverse of ``_stage``.

    Where several units contribute to an element (units of other rows, or of other heads that share it), each has a
    slot of its own; heads of one unit that share it are added, one after the other.
    """
    first, count, width, size = _place(tensor, unit)
    dtype, stride = tensor[DTYPE], size * tensor[CHANNEL]
    slot = unit[HEAD_GROUP] % tensor[HEAD_SLOTS] * tensor[ROW_SLOTS] + unit[ROW_BLOCK] % tensor[ROW_SLOTS]
    origin = (
        batch * tensor[BATCH] + head // tensor[REPEAT] * tensor[HEAD] + first * tensor[CHANNEL] + slot * tensor[SLOT]
    )
    for t in range(steps):
        address = tensor[ADDRESS] + size * (origin + (start + t) * tensor[TIME])
        at = t * width
        if tensor[ADD]:  # partial sums are in the state's dtype
            if dtype == FLOAT32:
                for i in range(count):
                    sum32 = simd.read_float32(address + i * stride) + element(out, at + i)
                    simd.write_float32(address + i * stride, sum32)
            else:
                for i in range(count):
                    sum64 = simd.read_float64(address + i * stride) + element(out, at + i)
                    simd.write_float64(address + i * stride, sum64)
        elif dtype == FLOAT32:
            for i in range(count):
                simd.write_float32(address + i * stride, element(out, at + i))
        elif dtype == FLOAT64:
            for i in range(count):
                simd.write_float64(address + i * stride, element(out, at + i))
        elif dtype == BFLOAT16:
            for i in range(count):
                simd.write_bfloat16(address + i * stride, element(out, at + i))
        else:
            for i in range(count):
                simd.write_float16(address + i * stride, element(out, at + i))


@_inline
def _state_offset(sizes, n, head, unit):
    return ((n * sizes[HEADS] + head) * sizes[KEY_DIM] + unit[FIRST_ROW]) * sizes[VALUE_DIM]


@_call
def _load_state(out, source, offset, unit, sizes):
    """The unit's rows of a state into ``out``, padded; zeros where there is no source."""
    columns, width = sizes[VALUE_DIM], sizes[WIDTH]
    rows = unit[LAST_ROW] - unit[FIRST_ROW]
    for i in range((rows + ROWS - 1) // ROWS * ROWS * width):
        out[i] = 0
    if source.size:
        for r in range(rows):
            for j in range(columns):
                out[r * width + j] = source[offset + r * columns + j]


@_call
def _save_state(out, offset, source, unit, sizes):
    """The unit's rows of the padded state ``source`` into ``out``, if there is room."""
    columns, width = sizes[VALUE_DIM], sizes[WIDTH]
    if out.size:
        for r in range(unit[LAST_ROW] - unit[FIRST_ROW]):
            for j in range(columns):
                out[offset + r * columns + j] = source[r * width + j]


@_inline
def _product(a, a_start, a_row, a_step, b, b_start, b_step, count, c0, c1, c2, c3):
    """c_m + Σ_n a[a_start + m·a_row + n·a_step] · b[b_start + n·b_step :][: lanes], the accumulators in registers."""
    for n in range(count):
        lanes = load(b, b_start + n * b_step)
        i = a_start + n * a_step
        c0 = fma(element(a, i), lanes, c0)
        c1 = fma(element(a, i + a_row), lanes, c1)
        c2 = fma(element(a, i + 2 * a_row), lanes, c2)
        c3 = fma(element(a, i + 3 * a_row), lanes, c3)
    return c0, c1, c2, c3


@_inline
def _store_rows(out, i, width, c0, c1, c2, c3):
    store(out, i, c0)
    store(out, i + width, c1)
    store(out, i + 2 * width, c2)
    store(out, i + 3 * width, c3)


@_inline
def _pre_activation(out, state, start, weight, weight_start, k, k_start, v, v_start, rows, columns, width):
    """out = H W + k vᵀ, where H is ``state[start:]`` and ``out`` is written from ``start`` too."""
    lanes = VECTOR_BYTES // state.itemsize
    for r in range(0, rows, ROWS):
        for p in range(0, width, lanes):
            v_p = load(v, v_start + p)
            i = k_start + r
            z0, z1, z2, z3 = _product(
                state, start + r * width, width, 1, weight, weight_start + p, width, columns,
                element(k, i) * v_p, element(k, i + 1) * v_p, element(k, i + 2) * v_p, element(k, i + 3) * v_p,
            )  # fmt: skip
            _store_rows(out, start + r * width + p, width, z0, z1, z2, z3)


@_jit
def forward(first_unit, units, scratch, tensors, sequences, sizes, weight, initial, final, saved):
    """y, the final states, and the state at the start of every chunk but a sequence's first."""
    q, k, v, f, y = scratch.q, scratch.k, scratch.v, scratch.f, scratch.y
    state, pre = scratch.states, scratch.updates
    lanes = VECTOR_BYTES // weight.itemsize
    columns, width, chunk = sizes[VALUE_DIM], sizes[WIDTH], sizes[CHUNK]
    origin = 0
    for u in range(units.shape[0]):
        unit = units[u]
        count = unit[LAST_ROW] - unit[FIRST_ROW]
        rows = (count + ROWS - 1) // ROWS * ROWS
        for head in range(unit[FIRST_HEAD], unit[LAST_HEAD]):
            weight_start = head // sizes[WEIGHT_REPEAT] * width * width
            for n in range(unit[FIRST_SEQUENCE], unit[LAST_SEQUENCE]):
                batch, start, length = sequences[n, BATCH_INDEX], sequences[n, START], sequences[n, LENGTH]
                _load_state(state, initial, _state_offset(sizes, n, head, unit), unit, sizes)
                number = sequences[n, FIRST_SAVED]
                for first in range(0, length, chunk):
                    steps = chunk if first + chunk <= length else length - first
                    at = start + first
                    if first > 0:
                        _save_state(saved, _state_offset(sizes, number, head, unit), state, unit, sizes)
                        number += 1
                    _stage(q, tensors[Q], unit, batch, at, steps, head)
                    _stage(k, tensors[K], unit, batch, at, steps, head)
                    _stage(v, tensors[V], unit, batch, at, steps, head)
                    _stage(f, tensors[F], unit, batch, at, steps, head)
                    for t in range(steps):
                        _pre_activation(
                            pre,
                            state,
                            origin,
                            weight,
                            weight_start,
                            k,
                            t * rows,
                            v,
                            t * width,
                            rows,
                            columns,
                            width,
                        )
                        keep = element(f, t)
                        for p in range(0, width, lanes):
                            y_p = zeros_like(y)
                            for r in range(count):
                                i = r * width + p
                                z = tanh(load(pre, i))
                                h = fma(keep, load(state, i), (1 - keep) * z)
                                store(state, i, h)
                                y_p = fma(element(q, t * rows + r), h, y_p)
                            store(y, t * width + p, y_p)
                    _unstage(y, tensors[Y], unit, batch, at, steps, head)
                _save_state(final, _state_offset(sizes, n, head, unit), state, unit, sizes)


@_jit
def backward(
    first_unit, units, scratch, tensors, sequences, sizes, weight, transposed, initial, saved, d_final, d_initial,
    d_weight, clip,
):  # fmt: skip
    """All gradients. A chunk at a time, from the last: recompute its states, then run back through them."""
    q, k, v, f, dy = scratch.q, scratch.k, scratch.v, scratch.f, scratch.y
    dq, dk, dv, df = scratch.dq, scratch.dk, scratch.dv, scratch.df
    states, updates, carry, d_head_weight = scratch.states, scratch.updates, scratch.carry, scratch.d_weight
    lanes = VECTOR_BYTES // weight.itemsize
    columns, width, chunk = sizes[VALUE_DIM], sizes[WIDTH], sizes[CHUNK]
    area = width * width
    for u in range(units.shape[0]):
        unit = units[u]
        count = unit[LAST_ROW] - unit[FIRST_ROW]
        rows = (count + ROWS - 1) // ROWS * ROWS
        size = rows * width
        for head in range(unit[FIRST_HEAD], unit[LAST_HEAD]):
            weight_start = head // sizes[WEIGHT_REPEAT] * area
            for i in range(area):
                d_head_weight[i] = 0
            for n in range(unit[FIRST_SEQUENCE], unit[LAST_SEQUENCE]):
                batch, start, length = sequences[n, BATCH_INDEX], sequences[n, START], sequences[n, LENGTH]
                _load_state(carry, d_final, _state_offset(sizes, n, head, unit), unit, sizes)
                for number in range((length - 1) // chunk, -1, -1):
                    first = number * chunk
                    steps = chunk if first + chunk <= length else length - first
                    at = start + first
                    _stage(q, tensors[Q], unit, batch, at, steps, head)
                    _stage(k, tensors[K], unit, batch, at, steps, head)
                    _stage(v, tensors[V], unit, batch, at, steps, head)
                    _stage(f, tensors[F], unit, batch, at, steps, head)
                    _stage(dy, tensors[Y], unit, batch, at, steps, head)
                    if number > 0:
                        index = sequences[n, FIRST_SAVED] + number - 1
                        _load_state(states, saved, _state_offset(sizes, index, head, unit), unit, sizes)
                    else:
                        _load_state(states, initial, _state_offset(sizes, n, head, unit), unit, sizes)

                    for t in range(steps):
                        _pre_activation(
                            updates, states, t * size, weight, weight_start, k, t * rows, v, t * width,
                            rows, columns, width,
                        )  # fmt: skip
                        keep = element(f, t)
                        for i in range(t * size, t * size + count * width, lanes):
                            z = tanh(load(updates, i))
                            store(updates, i, z)
                            store(states, i + size, fma(keep, load(states, i), (1 - keep) * z))
                        for i in range(t * size + count * width, (t + 1) * size, lanes):  # padding: 0 · inf is not 0
                            store(updates, i, zeros_like(updates))
                            store(states, i + size, zeros_like(states))

                    for t in range(steps - 1, -1, -1):
                        keep = element(f, t)
                        df_p = zeros_like(df)
                        for p in range(0, width, lanes):
                            store(dv, t * width + p, zeros_like(dv))
                        for r in range(count):
                            q_r, k_r = element(q, t * rows + r), element(k, t * rows + r)
                            dq_p, dk_p = zeros_like(dq), zeros_like(dk)
                            for p in range(0, width, lanes):
                                i, j = r * width + p, t * width + p
                                z, h, dy_p = (
                                    load(updates, t * size + i),
                                    load(states, t * size + i),
                                    load(dy, j),
                                )
                                g = fma(q_r, dy_p, simd.clamp(load(carry, i), clip))
                                dx = (1 - keep) * g * (1 - z * z)
                                dq_p = fma(load(states, (t + 1) * size + i), dy_p, dq_p)
                                dk_p = fma(dx, load(v, j), dk_p)
                                df_p = fma(g, h - z, df_p)
                                store(dv, j, fma(k_r, dx, load(dv, j)))
                                store(updates, t * size + i, dx)
                                store(carry, i, keep * g)
                            put(dq, t * rows + r, total(dq_p))
                            put(dk, t * rows + r, total(dk_p))
                        df[t] = total(df_p)
                        for r in range(0, rows, ROWS):
                            for p in range(0, width, lanes):
                                i = r * width + p
                                c0, c1, c2, c3 = _product(
                                    updates, t * size + r * width, width, 1,
                                    transposed, weight_start + p, width, columns,
                                    load(carry, i), load(carry, i + width),
                                    load(carry, i + 2 * width), load(carry, i + 3 * width),
                                )  # fmt: skip
                                _store_rows(carry, i, width, c0, c1, c2, c3)

                    for i in range(0, width, ROWS):  # dW += Σ H_{t-1}ᵀ dX, a chunk's sum on its own: less rounding
                        for p in range(0, width, lanes):
                            j = i * width + p
                            zero = zeros_like(carry)
                            w0, w1, w2, w3 = _product(
                                states, i, 1, width, updates, p, width, steps * rows, zero, zero, zero, zero
                            )
                            _store_rows(
                                d_head_weight, j, width,
                                load(d_head_weight, j) + w0, load(d_head_weight, j + width) + w1,
                                load(d_head_weight, j + 2 * width) + w2, load(d_head_weight, j + 3 * width) + w3,
                            )  # fmt: skip

                    _unstage(dq, tensors[DQ], unit, batch, at, steps, head)
                    _unstage(dk, tensors[DK], unit, batch, at, steps, head)
                    _unstage(dv, tensors[DV], unit, batch, at, steps, head)
                    _unstage(df, tensors[DF], unit, batch, at, steps, head)
                _save_state(d_initial, _state_offset(sizes, n, head, unit), carry, unit, sizes)
            offset = ((first_unit + u) * (unit[LAST_HEAD] - unit[FIRST_HEAD]) + head - unit[FIRST_HEAD]) * area
            for i in range(area):
                d_weight[offset + i] = d_head_weight[i]


@_jit
def apply_tanh(x, out):
    """tanh of x, whose size is a multiple of the vector's lanes."""
    for i in range(0, x.size, VECTOR_BYTES // x.itemsize):
        store(out, i, tanh(load(x, i)))
