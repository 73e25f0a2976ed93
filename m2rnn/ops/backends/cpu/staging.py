"""What the loops of all operators share: tensors copied into dense arrays and back, and products of blocks of rows.

Strides, 16-bit dtypes and padding are dealt with here, so that the arithmetic sees aligned rows of whole vectors only.
"""

from m2rnn.ops.backends.cpu import layout as layout
from m2rnn.ops.backends.cpu import simd
from m2rnn.ops.backends.cpu.jit import inline, outlined
from m2rnn.ops.backends.cpu.layout import ROWS
from m2rnn.ops.backends.cpu.simd import element, fma, lanes_of, load, offset, put, store


@inline
def table_row(tensors, index):
    return offset(tensors, index * layout.TENSOR_COLUMNS)


@inline
def _place(tensor, unit):
    """(first channel, channels, padded channels, bytes an element) of a tensor's part that belongs to a unit."""
    first, count, width = 0, tensor[layout.CHANNELS], tensor[layout.PADDED]
    if tensor[layout.BY_ROW]:
        first, count = unit[layout.FIRST_ROW], unit[layout.LAST_ROW] - unit[layout.FIRST_ROW]
        width = (count + ROWS - 1) // ROWS * ROWS
    dtype = tensor[layout.DTYPE]
    return first, count, width, 4 if dtype == layout.FLOAT32 else 8 if dtype == layout.FLOAT64 else 2


@outlined
def stage(out, tensor, unit, batch, start, steps, head):
    """Copy ``steps`` time steps of one head into ``out``, converted and padded with zeros."""
    first, count, width, size = _place(tensor, unit)
    dtype, stride, step = tensor[layout.DTYPE], size * tensor[layout.CHANNEL], size * tensor[layout.TIME]
    origin = (
        batch * tensor[layout.BATCH]
        + head // tensor[layout.REPEAT] * tensor[layout.HEAD]
        + first * tensor[layout.CHANNEL]
    )
    address = tensor[layout.ADDRESS] + size * origin + step * start
    dense = stride == size
    if dense and step == size * count and count == width:  # one long row
        count, width, steps = steps * count, steps * count, 1
    for t in range(steps):
        at, row = t * width, address + t * step
        done = 0
        if dense:
            done = count - count % lanes_of(out)
            for i in range(0, done, lanes_of(out)):
                simd.read_lanes(out, at + i, row + i * size, dtype)
        if dtype == layout.FLOAT32:
            for i in range(done, count):
                simd.read_float32(out, at + i, row + i * stride)
        elif dtype == layout.FLOAT64:
            for i in range(done, count):
                simd.read_float64(out, at + i, row + i * stride)
        elif dtype == layout.BFLOAT16:
            for i in range(done, count):
                simd.read_bfloat16(out, at + i, row + i * stride)
        else:
            for i in range(done, count):
                simd.read_float16(out, at + i, row + i * stride)
        for i in range(count, width):
            put(out, at + i, 0.0)


@outlined
def unstage(array, tensor, unit, batch, start, steps, head):
    """Write ``steps`` time steps of one head from ``array``, the inverse of ``stage``.

    Where several units contribute to an element (units of other rows, or of other heads that share it), each has a
    slot of its own; heads of one unit that share it are added, one after the other. Slots are dense.
    """
    first, count, width, size = _place(tensor, unit)
    dtype, stride, step = tensor[layout.DTYPE], size * tensor[layout.CHANNEL], size * tensor[layout.TIME]
    slot = (
        unit[layout.HEAD_GROUP] % tensor[layout.HEAD_SLOTS] * tensor[layout.ROW_SLOTS]
        + unit[layout.ROW_BLOCK] % tensor[layout.ROW_SLOTS]
    )
    origin = (
        batch * tensor[layout.BATCH]
        + head // tensor[layout.REPEAT] * tensor[layout.HEAD]
        + first * tensor[layout.CHANNEL]
        + slot * tensor[layout.SLOT]
    )
    address = tensor[layout.ADDRESS] + size * origin + step * start
    dense = stride == size
    if dense and step == size * count and count == width:  # one long row
        count, width, steps = steps * count, steps * count, 1
    for t in range(steps):
        at, row = t * width, address + t * step
        done = count - count % lanes_of(array) if dense else 0
        if tensor[layout.ADD]:  # partial sums are in the state's dtype
            sums = simd.array_at(row, array)
            for i in range(0, done, lanes_of(array)):
                store(sums, i, load(sums, i) + load(array, at + i))
            for i in range(done, count):
                put(sums, i, element(sums, i) + element(array, at + i))
            continue
        for i in range(0, done, lanes_of(array)):
            simd.write_lanes(row + i * size, array, at + i, dtype)
        if dtype == layout.FLOAT32:
            for i in range(done, count):
                simd.write_float32(row + i * stride, array, at + i)
        elif dtype == layout.FLOAT64:
            for i in range(done, count):
                simd.write_float64(row + i * stride, array, at + i)
        elif dtype == layout.BFLOAT16:
            for i in range(done, count):
                simd.write_bfloat16(row + i * stride, array, at + i)
        else:
            for i in range(done, count):
                simd.write_float16(row + i * stride, array, at + i)


@inline
def product(a, a_start, a_row, a_step, b, b_start, b_step, count, c0, c1, c2, c3):
    """c_m + Σ_n a[a_start + m·a_row + n·a_step] · b[b_start + n·b_step :][: lanes], the accumulators in registers."""
    for n in range(count):
        lanes = load(b, b_start + n * b_step)
        i = a_start + n * a_step
        c0 = fma(element(a, i), lanes, c0)
        c1 = fma(element(a, i + a_row), lanes, c1)
        c2 = fma(element(a, i + 2 * a_row), lanes, c2)
        c3 = fma(element(a, i + 3 * a_row), lanes, c3)
    return c0, c1, c2, c3


@inline
def store_rows(out, i, width, c0, c1, c2, c3):
    store(out, i, c0)
    store(out, i + width, c1)
    store(out, i + 2 * width, c2)
    store(out, i + 3 * width, c3)
