"""The loops of the CPU backend, compiled by numba; ``cpu.py`` plans the work and calls them through ``code.py``.

A *unit* of work is a range of sequences, heads and state rows that one thread takes from the first step to the last.
Within a unit, ``chunk`` time steps at a time are copied into small dense arrays ("staged"): that is where strides,
16-bit dtypes and padding are dealt with, so that the arithmetic sees aligned rows of whole vectors only. V is padded
to whole vectors and the rows to blocks of four with zeros, which stay zero as long as k and v are finite.

Arrays are bare pointers and the tables are those of ``layout.py``. Everything the arithmetic needs in order to be
the same bits for any number of threads is fixed by the shapes: units, their order, and who adds to what.
"""

from m2rnn.ops.backends.cpu import layout as layout
from m2rnn.ops.backends.cpu import simd
from m2rnn.ops.backends.cpu.jit import inline, outlined
from m2rnn.ops.backends.cpu.layout import ROWS
from m2rnn.ops.backends.cpu.simd import (
    element,
    exists,
    fma,
    fnma,
    lanes_of,
    load,
    offset,
    put,
    store,
    tanh,
    total,
    zeros_like,
)
from m2rnn.ops.backends.cpu.staging import product, stage, store_rows, table_row, unstage


@inline
def _state_offset(sizes, n, head, unit):
    return ((n * sizes[layout.HEADS] + head) * sizes[layout.KEY_DIM] + unit[layout.FIRST_ROW]) * sizes[layout.VALUE_DIM]


@outlined
def _load_state(out, source, start, unit, sizes):
    """The unit's rows of a state into ``out``, padded; zeros where there is no source."""
    columns, width = sizes[layout.VALUE_DIM], sizes[layout.WIDTH]
    rows = unit[layout.LAST_ROW] - unit[layout.FIRST_ROW]
    for i in range(0, (rows + ROWS - 1) // ROWS * ROWS * width, lanes_of(out)):
        store(out, i, zeros_like(out))
    if exists(source):
        for r in range(rows):
            for j in range(columns):
                put(out, r * width + j, element(source, start + r * columns + j))


@outlined
def _save_state(out, start, source, unit, sizes):
    """The unit's rows of the padded state ``source`` into ``out``, if there is room."""
    columns, width = sizes[layout.VALUE_DIM], sizes[layout.WIDTH]
    if exists(out):
        for r in range(unit[layout.LAST_ROW] - unit[layout.FIRST_ROW]):
            for j in range(columns):
                put(out, start + r * columns + j, element(source, r * width + j))


@inline
def _pre_activation(out, state, weight, k, v, columns, width):
    """out = H W + k vᵀ for one block of rows of H."""
    for p in range(0, width, lanes_of(state)):
        v_p = load(v, p)
        z0, z1, z2, z3 = product(
            state, 0, width, 1, weight, p, width, columns,
            element(k, 0) * v_p, element(k, 1) * v_p, element(k, 2) * v_p, element(k, 3) * v_p,
        )  # fmt: skip
        store_rows(out, p, width, z0, z1, z2, z3)


@inline
def _put_row_totals(out, i, sums):
    step = 2 * lanes_of(sums)
    simd.put_totals(out, i, load(sums, 0), load(sums, step), load(sums, 2 * step), load(sums, 3 * step))


def forward(first_unit, last_unit, units, tensors, sequences, sizes, scratch, weights, initial, final, saved):
    """y, the final states, and the state at the start of every chunk but a sequence's first."""
    lanes, columns, width, chunk = lanes_of(weights), sizes[layout.VALUE_DIM], sizes[layout.WIDTH], sizes[layout.CHUNK]
    for u in range(first_unit, last_unit):
        unit = offset(units, u * layout.UNIT_COLUMNS)
        count = unit[layout.LAST_ROW] - unit[layout.FIRST_ROW]
        rows = (count + ROWS - 1) // ROWS * ROWS
        q = scratch
        k = offset(q, chunk * rows)
        v = offset(k, chunk * rows)
        f = offset(v, chunk * width)
        y = offset(f, chunk)
        state = offset(y, chunk * width)
        pre = offset(state, rows * width)
        for head in range(unit[layout.FIRST_HEAD], unit[layout.LAST_HEAD]):
            weight = offset(weights, head // sizes[layout.WEIGHT_REPEAT] * width * width)
            for n in range(unit[layout.FIRST_SEQUENCE], unit[layout.LAST_SEQUENCE]):
                sequence = offset(sequences, n * layout.SEQUENCE_COLUMNS)
                batch, start, length = sequence[layout.BATCH_INDEX], sequence[layout.START], sequence[layout.LENGTH]
                _load_state(state, initial, _state_offset(sizes, n, head, unit), unit, sizes)
                number = sequence[layout.FIRST_SAVED]
                for first in range(0, length, chunk):
                    steps = chunk if first + chunk <= length else length - first
                    at = start + first
                    if first > 0:
                        _save_state(saved, _state_offset(sizes, number, head, unit), state, unit, sizes)
                        number += 1
                    stage(q, table_row(tensors, layout.Q), unit, batch, at, steps, head)
                    stage(k, table_row(tensors, layout.K), unit, batch, at, steps, head)
                    stage(v, table_row(tensors, layout.V), unit, batch, at, steps, head)
                    stage(f, table_row(tensors, layout.F), unit, batch, at, steps, head)
                    for t in range(steps):
                        keep = element(f, t)
                        for block in range(0, rows, ROWS):
                            _pre_activation(
                                offset(pre, block * width), offset(state, block * width), weight,
                                offset(k, t * rows + block), offset(v, t * width), columns, width,
                            )  # fmt: skip
                        for p in range(0, width, lanes):
                            y_p = zeros_like(y)
                            for r in range(count):  # the padding stays 0: 0 · inf is not 0
                                i = r * width + p
                                h = fma(keep, load(state, i), (1 - keep) * tanh(load(pre, i)))
                                store(state, i, h)
                                y_p = fma(element(q, t * rows + r), h, y_p)
                            store(y, t * width + p, y_p)
                    unstage(y, table_row(tensors, layout.Y), unit, batch, at, steps, head)
                _save_state(final, _state_offset(sizes, n, head, unit), state, unit, sizes)


def backward(
    first_unit, last_unit, units, tensors, sequences, sizes, scratch, weights, transposed_weights, initial, saved,
    d_final, d_initial, d_weights, clip,
):  # fmt: skip
    """All gradients. A chunk at a time, from the last: recompute its states, then run back through them."""
    lanes, columns, width, chunk = lanes_of(weights), sizes[layout.VALUE_DIM], sizes[layout.WIDTH], sizes[layout.CHUNK]
    area = width * width
    for u in range(first_unit, last_unit):
        unit = offset(units, u * layout.UNIT_COLUMNS)
        count = unit[layout.LAST_ROW] - unit[layout.FIRST_ROW]
        rows = (count + ROWS - 1) // ROWS * ROWS
        size = rows * width
        q = scratch
        k = offset(q, chunk * rows)
        v = offset(k, chunk * rows)
        f = offset(v, chunk * width)
        dy = offset(f, chunk)
        states = offset(dy, chunk * width)
        updates = offset(states, (chunk + 1) * size)
        dq = offset(updates, chunk * size)
        dk = offset(dq, chunk * rows)
        dv = offset(dk, chunk * rows)
        df = offset(dv, chunk * width)
        carry = offset(df, chunk)
        d_head_weight = offset(carry, size)
        sums = offset(d_head_weight, area)
        for head in range(unit[layout.FIRST_HEAD], unit[layout.LAST_HEAD]):
            weight = offset(weights, head // sizes[layout.WEIGHT_REPEAT] * area)
            transposed = offset(transposed_weights, head // sizes[layout.WEIGHT_REPEAT] * area)
            for i in range(0, area, lanes):
                store(d_head_weight, i, zeros_like(carry))
            for n in range(unit[layout.FIRST_SEQUENCE], unit[layout.LAST_SEQUENCE]):
                sequence = offset(sequences, n * layout.SEQUENCE_COLUMNS)
                batch, start, length = sequence[layout.BATCH_INDEX], sequence[layout.START], sequence[layout.LENGTH]
                _load_state(carry, d_final, _state_offset(sizes, n, head, unit), unit, sizes)
                for number in range((length - 1) // chunk, -1, -1):
                    first = number * chunk
                    steps = chunk if first + chunk <= length else length - first
                    at = start + first
                    stage(q, table_row(tensors, layout.Q), unit, batch, at, steps, head)
                    stage(k, table_row(tensors, layout.K), unit, batch, at, steps, head)
                    stage(v, table_row(tensors, layout.V), unit, batch, at, steps, head)
                    stage(f, table_row(tensors, layout.F), unit, batch, at, steps, head)
                    stage(dy, table_row(tensors, layout.Y), unit, batch, at, steps, head)
                    if number > 0:
                        index = sequence[layout.FIRST_SAVED] + number - 1
                        _load_state(states, saved, _state_offset(sizes, index, head, unit), unit, sizes)
                    else:
                        _load_state(states, initial, _state_offset(sizes, n, head, unit), unit, sizes)

                    for t in range(steps):
                        keep = element(f, t)
                        h, z = offset(states, t * size), offset(updates, t * size)
                        for block in range(0, rows, ROWS):
                            _pre_activation(
                                offset(z, block * width), offset(h, block * width), weight,
                                offset(k, t * rows + block), offset(v, t * width), columns, width,
                            )  # fmt: skip
                        for i in range(0, count * width, lanes):
                            z_i = tanh(load(z, i))
                            store(z, i, z_i)
                            store(h, i + size, fma(keep, load(h, i), (1 - keep) * z_i))
                        for i in range(count * width, size, lanes):  # padding: 0 · inf is not 0
                            store(z, i, zeros_like(z))
                            store(h, i + size, zeros_like(h))

                    for t in range(steps - 1, -1, -1):
                        keep = element(f, t)
                        df_p = zeros_like(df)
                        h, z = offset(states, t * size), offset(updates, t * size)
                        for p in range(0, width, lanes):
                            dy_p, v_p, dv_p = load(dy, t * width + p), load(v, t * width + p), zeros_like(dv)
                            for r in range(count):
                                i = r * width + p
                                z_p = load(z, i)
                                g = fma(element(q, t * rows + r), dy_p, simd.clamp(load(carry, i), clip))
                                dx = (1 - keep) * g
                                dx = fnma(z_p * z_p, dx, dx)
                                dv_p = fma(element(k, t * rows + r), dx, dv_p)
                                df_p = fma(g, load(h, i) - z_p, df_p)
                                store(z, i, dx)
                                store(carry, i, keep * g)
                                j = 2 * r * lanes
                                dq_p, dk_p = zeros_like(dq), zeros_like(dk)
                                if p > 0:
                                    dq_p, dk_p = load(sums, j), load(sums, j + lanes)
                                store(sums, j, fma(load(h, i + size), dy_p, dq_p))
                                store(sums, j + lanes, fma(dx, v_p, dk_p))
                            store(dv, t * width + p, dv_p)
                        put(df, t, total(df_p))
                        for block in range(0, rows, ROWS):
                            block_sums = offset(sums, 2 * block * lanes)
                            _put_row_totals(dq, t * rows + block, block_sums)
                            _put_row_totals(dk, t * rows + block, offset(block_sums, lanes))
                        for block in range(0, rows, ROWS):
                            c, dx_block = offset(carry, block * width), offset(z, block * width)
                            for p in range(0, width, lanes):
                                c0, c1, c2, c3 = product(
                                    dx_block, 0, width, 1, transposed, p, width, columns,
                                    load(c, p), load(c, p + width), load(c, p + 2 * width), load(c, p + 3 * width),
                                )  # fmt: skip
                                store_rows(c, p, width, c0, c1, c2, c3)

                    for i in range(0, width, ROWS):  # dW += Σ H_{t-1}ᵀ dX, a chunk's sum on its own: less rounding
                        for p in range(0, width, lanes):
                            j = i * width + p
                            zero = zeros_like(carry)
                            w0, w1, w2, w3 = product(
                                states, i, 1, width, updates, p, width, steps * rows, zero, zero, zero, zero
                            )
                            store_rows(
                                d_head_weight, j, width,
                                load(d_head_weight, j) + w0, load(d_head_weight, j + width) + w1,
                                load(d_head_weight, j + 2 * width) + w2, load(d_head_weight, j + 3 * width) + w3,
                            )  # fmt: skip

                    unstage(dq, table_row(tensors, layout.DQ), unit, batch, at, steps, head)
                    unstage(dk, table_row(tensors, layout.DK), unit, batch, at, steps, head)
                    unstage(dv, table_row(tensors, layout.DV), unit, batch, at, steps, head)
                    unstage(df, table_row(tensors, layout.DF), unit, batch, at, steps, head)
                _save_state(d_initial, _state_offset(sizes, n, head, unit), carry, unit, sizes)
            place = (u * (unit[layout.LAST_HEAD] - unit[layout.FIRST_HEAD]) + head - unit[layout.FIRST_HEAD]) * area
            for i in range(0, area, lanes):
                store(d_weights, place + i, load(d_head_weight, i))


def apply_tanh(x, out, size):
    """tanh of x, whose size is a multiple of the vector's lanes."""
    for i in range(0, size, lanes_of(x)):
        store(out, i, tanh(load(x, i)))
