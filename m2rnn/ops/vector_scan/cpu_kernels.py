"""The loops of the vector recurrences, RNN and GRU, compiled as M2RNN's are; ``cpu.py`` plans them.

A *unit* of work is a range of sequences and of heads. It takes a *tile* of sequences at a time, which share each head's
matrices as the rows of a state. Some steps at a time, it goes through its heads, whose inputs lie side by side.
Sequences come longest first, so that those of a tile that have a step are its first rows. Staged inputs are
[sequence of the tile, step, V padded], and are overwritten by what is computed from them.
"""

from m2rnn.ops.backends.cpu import layout as layout
from m2rnn.ops.backends.cpu import simd
from m2rnn.ops.backends.cpu.jit import inline, outlined
from m2rnn.ops.backends.cpu.layout import ROWS
from m2rnn.ops.backends.cpu.simd import element, exists, fma, fnma, lanes_of, load, offset, put, store, tanh, zeros_like
from m2rnn.ops.backends.cpu.staging import product, stage, store_rows, table_row, unstage


@inline
def _sigmoid(x):
    return fma(tanh(0.5 * x), 0.5, 0.5)


@inline
def _sequence(sequences, n):
    return offset(sequences, n * layout.SEQUENCE_COLUMNS)


@inline
def _length(sequences, n):
    return _sequence(sequences, n)[layout.LENGTH]


@inline
def _steps(sequences, n, first, most):
    """How many steps from ``first`` on sequence n has, ``most`` at most."""
    left = _length(sequences, n) - first
    return most if left > most else left


@inline
def _padded(rows):
    return (rows + ROWS - 1) // ROWS * ROWS


@inline
def _row_size(sizes, array):
    """From one sequence of a tile to the next in staged arrays: a line more than it takes, against cache conflicts."""
    return sizes[layout.STEPS] * sizes[layout.UNITS_PADDED] + lanes_of(array)


@inline
def _state_offset(sizes, sequences, n, head):
    return (_sequence(sequences, n)[layout.NUMBER] * sizes[layout.HEADS] + head) * sizes[layout.UNITS]


@outlined
def _load_state(out, source, start, count, width):
    """A state into a padded row; zeros where there is no source."""
    for i in range(0, width, lanes_of(out)):
        store(out, i, zeros_like(out))
    if exists(source):
        for i in range(count):
            put(out, i, element(source, start + i))


@outlined
def _load_states(out, source, unit, sequences, sizes, n, first_row, last_row):
    """States of some sequences of a tile, from n + ``first_row`` on, into [head of the unit, row, V padded]."""
    count, width, first_head = sizes[layout.UNITS], sizes[layout.UNITS_PADDED], unit[layout.FIRST_HEAD]
    for head in range(first_head, unit[layout.LAST_HEAD]):
        for r in range(first_row, last_row):
            place = ((head - first_head) * sizes[layout.TILE] + r) * width
            _load_state(offset(out, place), source, _state_offset(sizes, sequences, n + r, head), count, width)


@outlined
def _save_states(out, source, unit, sequences, sizes, n):
    """The inverse, for a whole tile, if there is room."""
    first_head, rows = unit[layout.FIRST_HEAD], unit[layout.LAST_SEQUENCE] - n
    if exists(out):
        for head in range(first_head, unit[layout.LAST_HEAD]):
            for r in range(sizes[layout.TILE] if rows > sizes[layout.TILE] else rows):
                place = ((head - first_head) * sizes[layout.TILE] + r) * sizes[layout.UNITS_PADDED]
                start = _state_offset(sizes, sequences, n + r, head)
                for i in range(sizes[layout.UNITS]):
                    put(out, start + i, element(source, place + i))


@outlined
def _stage_tile(out, index, tensors, unit, sequences, sizes, n, alive, first, head):
    """Of a tensor, the steps from ``first`` on that the first ``alive`` sequences from n on have."""
    for r in range(alive):
        sequence = _sequence(sequences, n + r)
        batch, at = sequence[layout.BATCH_INDEX], sequence[layout.START] + first
        steps = _steps(sequences, n + r, first, sizes[layout.STEPS])
        stage(offset(out, r * _row_size(sizes, out)), table_row(tensors, index), unit, batch, at, steps, head)


@outlined
def _unstage_tile(array, index, tensors, unit, sequences, sizes, n, alive, first, head):
    """The inverse of ``_stage_tile``."""
    for r in range(alive):
        sequence = _sequence(sequences, n + r)
        batch, at = sequence[layout.BATCH_INDEX], sequence[layout.START] + first
        steps = _steps(sequences, n + r, first, sizes[layout.STEPS])
        unstage(offset(array, r * _row_size(sizes, array)), table_row(tensors, index), unit, batch, at, steps, head)


@outlined
def _add_product(out, out_row, a, a_row, weight, units, width, rows):
    """out += A W for some rows, a multiple of four; ``out_row`` and ``a_row`` are from one row to the next."""
    for p in range(0, width, lanes_of(out)):
        for block in range(0, rows, ROWS):
            i = block * out_row + p
            c0, c1, c2, c3 = product(
                a, block * a_row, a_row, 1, weight, p, width, units,
                load(out, i), load(out, i + out_row), load(out, i + 2 * out_row), load(out, i + 3 * out_row),
            )  # fmt: skip
            store_rows(out, i, out_row, c0, c1, c2, c3)


@outlined
def _add_outer_products(out, a, b, sequences, sizes, n, alive, first):
    """out += Σ aᵀ b over the staged steps of a tile: a sum on its own first, for less rounding."""
    width, row, zero = sizes[layout.UNITS_PADDED], _row_size(sizes, out), zeros_like(out)
    for i in range(0, sizes[layout.UNITS], ROWS):
        for p in range(0, width, lanes_of(out)):
            c0, c1, c2, c3 = zero, zero, zero, zero
            for r in range(alive):
                steps, at = _steps(sequences, n + r, first, sizes[layout.STEPS]), r * row
                c0, c1, c2, c3 = product(a, at + i, 1, width, b, at + p, width, steps, c0, c1, c2, c3)
            j = i * width + p
            store_rows(
                out, j, width, load(out, j) + c0, load(out, j + width) + c1, load(out, j + 2 * width) + c2,
                load(out, j + 3 * width) + c3,
            )  # fmt: skip


def rnn_forward(first_unit, last_unit, units, tensors, sequences, sizes, scratch, weights, initial, final):
    """y and the final states."""
    lanes, count, width = lanes_of(weights), sizes[layout.UNITS], sizes[layout.UNITS_PADDED]
    steps, tile, gated, heads = sizes[layout.STEPS], sizes[layout.TILE], sizes[layout.GATED], sizes[layout.HEADS]
    row, area = _row_size(sizes, scratch), width * width
    x = scratch
    forget = offset(x, tile * row)
    reset = offset(forget, tile * row)
    kept = offset(x, tile * row * (3 if gated else 1))
    states = offset(kept, tile * width)
    for u in range(first_unit, last_unit):
        unit = offset(units, u * layout.UNIT_COLUMNS)
        first_head, last_head = unit[layout.FIRST_HEAD], unit[layout.LAST_HEAD]
        for n in range(unit[layout.FIRST_SEQUENCE], unit[layout.LAST_SEQUENCE], tile):
            alive = unit[layout.LAST_SEQUENCE] - n
            alive = tile if alive > tile else alive
            _load_states(states, initial, unit, sequences, sizes, n, 0, alive)
            for first in range(0, _length(sequences, n), steps):
                while _length(sequences, n + alive - 1) <= first:
                    alive -= 1
                for head in range(first_head, last_head):
                    weight = offset(weights, head * area)
                    forget_weight, reset_weight = offset(weight, heads * area), offset(weight, 2 * heads * area)
                    state = offset(states, (head - first_head) * tile * width)
                    _stage_tile(x, layout.X, tensors, unit, sequences, sizes, n, alive, first, head)
                    if gated:
                        _stage_tile(forget, layout.X_FORGET, tensors, unit, sequences, sizes, n, alive, first, head)
                        _stage_tile(reset, layout.X_RESET, tensors, unit, sequences, sizes, n, alive, first, head)
                    active = alive
                    for t in range(_steps(sequences, n, first, steps)):
                        while _length(sequences, n + active - 1) <= first + t:
                            active -= 1
                        padded, x_t = _padded(active), offset(x, t * width)
                        if gated:
                            forget_t, reset_t = offset(forget, t * width), offset(reset, t * width)
                            _add_product(forget_t, row, state, width, forget_weight, count, width, padded)
                            _add_product(reset_t, row, state, width, reset_weight, count, width, padded)
                            for r in range(active):
                                for p in range(0, width, lanes):
                                    i, j = r * width + p, r * row + p
                                    store(kept, i, _sigmoid(load(reset_t, j)) * load(state, i))
                            _add_product(x_t, row, kept, width, weight, count, width, padded)
                            for r in range(active):
                                for p in range(0, width, lanes):
                                    i, j = r * width + p, r * row + p
                                    keep, z = _sigmoid(load(forget_t, j)), tanh(load(x_t, j))
                                    h = fma(keep, load(state, i) - z, z)
                                    store(state, i, h)
                                    store(x_t, j, h)
                        else:
                            _add_product(x_t, row, state, width, weight, count, width, padded)
                            for r in range(active):
                                for p in range(0, width, lanes):
                                    h = tanh(load(x_t, r * row + p))
                                    store(state, r * width + p, h)
                                    store(x_t, r * row + p, h)
                    _unstage_tile(x, layout.STATE, tensors, unit, sequences, sizes, n, alive, first, head)
            _save_states(final, states, unit, sequences, sizes, n)


def rnn_backward(
    first_unit, last_unit, units, tensors, sequences, sizes, scratch, weights, transposed_weights, initial, d_final,
    d_initial, d_weights, clip,
):  # fmt: skip
    """All gradients. What a step computes from the state before it, which is an output, needs no order."""
    lanes, count, width = lanes_of(weights), sizes[layout.UNITS], sizes[layout.UNITS_PADDED]
    steps, tile, gated, heads = sizes[layout.STEPS], sizes[layout.TILE], sizes[layout.GATED], sizes[layout.HEADS]
    row, area, matrices = _row_size(sizes, scratch), width * width, 3 if gated else 1
    h = scratch
    dy = offset(h, tile * row)
    z = offset(dy, tile * row)  # then the gradient of x
    forget = offset(z, tile * row)  # f, then the gradient of its logit
    reset = offset(forget, tile * row)  # r, then the gradient of its logit
    kept = offset(reset, tile * row) if gated else h  # r ⊙ h
    d_kept = offset(h, tile * row * (6 if gated else 3))
    carries = offset(d_kept, tile * width)
    for u in range(first_unit, last_unit):
        unit = offset(units, u * layout.UNIT_COLUMNS)
        first_head, last_head = unit[layout.FIRST_HEAD], unit[layout.LAST_HEAD]
        d_unit_weights = offset(d_weights, (unit[layout.ROW_BLOCK] * heads + first_head) * matrices * area)
        for i in range(0, (last_head - first_head) * matrices * area, lanes):
            store(d_unit_weights, i, zeros_like(h))
        for n in range(unit[layout.FIRST_SEQUENCE], unit[layout.LAST_SEQUENCE], tile):
            rows = unit[layout.LAST_SEQUENCE] - n
            rows = tile if rows > tile else rows
            alive = 0
            for number in range((_length(sequences, n) - 1) // steps, -1, -1):
                first, before = number * steps, alive
                while alive < rows and _length(sequences, n + alive) > first:
                    alive += 1
                for head in range(first_head, last_head):
                    weight, transposed = offset(weights, head * area), offset(transposed_weights, head * area)
                    forget_weight, reset_weight = offset(weight, heads * area), offset(weight, 2 * heads * area)
                    forget_back, reset_back = offset(transposed, heads * area), offset(transposed, 2 * heads * area)
                    carry = offset(carries, (head - first_head) * tile * width)
                    _stage_tile(z, layout.X, tensors, unit, sequences, sizes, n, alive, first, head)
                    _stage_tile(dy, layout.DSTATE, tensors, unit, sequences, sizes, n, alive, first, head)
                    if gated:
                        _stage_tile(forget, layout.X_FORGET, tensors, unit, sequences, sizes, n, alive, first, head)
                        _stage_tile(reset, layout.X_RESET, tensors, unit, sequences, sizes, n, alive, first, head)
                    for r in range(alive):
                        sequence, h_r, z_r = _sequence(sequences, n + r), offset(h, r * row), offset(z, r * row)
                        batch, at = sequence[layout.BATCH_INDEX], sequence[layout.START] + first
                        some, states = _steps(sequences, n + r, first, steps), table_row(tensors, layout.STATE)
                        if first > 0:
                            stage(h_r, states, unit, batch, at - 1, some, head)
                        else:
                            _load_state(h_r, initial, _state_offset(sizes, sequences, n + r, head), count, width)
                            stage(offset(h_r, width), states, unit, batch, at, some - 1, head)
                        if gated:
                            forget_r, reset_r = offset(forget, r * row), offset(reset, r * row)
                            _add_product(forget_r, width, h_r, width, forget_weight, count, width, _padded(some))
                            _add_product(reset_r, width, h_r, width, reset_weight, count, width, _padded(some))
                            for i in range(0, some * width, lanes):
                                keep = _sigmoid(load(reset_r, i))
                                store(reset_r, i, keep)
                                store(kept, r * row + i, keep * load(h_r, i))
                                store(forget_r, i, _sigmoid(load(forget_r, i)))
                        _add_product(z_r, width, offset(kept, r * row), width, weight, count, width, _padded(some))
                        for i in range(0, some * width, lanes):
                            store(z_r, i, tanh(load(z_r, i)))

                    active = before
                    for t in range(_steps(sequences, n, first, steps) - 1, -1, -1):
                        while active < alive and _length(sequences, n + active) > first + t:
                            start = _state_offset(sizes, sequences, n + active, head)
                            _load_state(offset(carry, active * width), d_final, start, count, width)
                            active += 1
                        padded, z_t, dy_t = _padded(active), offset(z, t * width), offset(dy, t * width)
                        if gated:
                            h_t, forget_t, reset_t = (
                                offset(h, t * width), offset(forget, t * width), offset(reset, t * width),
                            )  # fmt: skip
                            for r in range(active):
                                for p in range(0, width, lanes):
                                    i, j = r * width + p, r * row + p
                                    g = load(dy_t, j) + simd.clamp(load(carry, i), clip)
                                    z_p, keep = load(z_t, j), load(forget_t, j)
                                    rest = fnma(keep, g, g)
                                    store(z_t, j, fnma(z_p * z_p, rest, rest))
                                    store(forget_t, j, (load(h_t, j) - z_p) * (keep * rest))
                                    store(carry, i, keep * g)
                                    store(d_kept, i, zeros_like(h))
                            _add_product(d_kept, width, z_t, row, transposed, count, width, padded)
                            for r in range(active):
                                for p in range(0, width, lanes):
                                    i, j = r * width + p, r * row + p
                                    keep = load(reset_t, j)
                                    d_state = keep * load(d_kept, i)
                                    store(carry, i, load(carry, i) + d_state)
                                    store(reset_t, j, load(h_t, j) * fnma(keep, d_state, d_state))
                            _add_product(carry, width, forget_t, row, forget_back, count, width, padded)
                            _add_product(carry, width, reset_t, row, reset_back, count, width, padded)
                        else:
                            for r in range(active):
                                for p in range(0, width, lanes):
                                    i, j = r * width + p, r * row + p
                                    g, z_p = load(dy_t, j) + simd.clamp(load(carry, i), clip), load(z_t, j)
                                    store(z_t, j, fnma(z_p * z_p, g, g))
                                    store(carry, i, zeros_like(h))
                            _add_product(carry, width, z_t, row, transposed, count, width, padded)

                    d_weight = offset(d_unit_weights, (head - first_head) * matrices * area)
                    _add_outer_products(d_weight, kept, z, sequences, sizes, n, alive, first)
                    _unstage_tile(z, layout.DX, tensors, unit, sequences, sizes, n, alive, first, head)
                    if gated:
                        d_forget, d_reset = offset(d_weight, area), offset(d_weight, 2 * area)
                        _add_outer_products(d_forget, h, forget, sequences, sizes, n, alive, first)
                        _add_outer_products(d_reset, h, reset, sequences, sizes, n, alive, first)
                        _unstage_tile(forget, layout.DX_FORGET, tensors, unit, sequences, sizes, n, alive, first, head)
                        _unstage_tile(reset, layout.DX_RESET, tensors, unit, sequences, sizes, n, alive, first, head)
            _load_states(carries, d_final, unit, sequences, sizes, n, alive, rows)  # of empty sequences
            _save_states(d_initial, carries, unit, sequences, sizes, n)
