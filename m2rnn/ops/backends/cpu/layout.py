"""The tables by which an operator's ``cpu.py`` tells its compiled kernels what to do: all that both must agree on."""

VECTOR_BYTES = 64
ROWS = 4  # state rows that one block of accumulators covers; rows are padded to a multiple of it

# Codes of the dtypes of tensors
FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = range(4)

# Columns of ``tensors``, all integers: the address of element 0, the dtype's code, strides in elements, how many heads
# share one of the tensor's, whether the channels are the state's rows (else: how many there are, and padded), and for
# outputs whether to add to what is there and how partial sums are numbered (see ``unstage``).
(
    ADDRESS, DTYPE, SLOT, BATCH, TIME, HEAD, CHANNEL, REPEAT, BY_ROW, CHANNELS, PADDED, ADD, HEAD_SLOTS, ROW_SLOTS,
) = range(TENSOR_COLUMNS := 14)  # fmt: skip
# Rows of ``tensors``. The forward pass uses the first five; in the backward pass Y is the gradient of y.
Q, K, V, F, Y, DQ, DK, DV, DF = range(9)
# Columns of ``units``: ranges [first, last), and the unit's place among those that split rows and heads
(
    FIRST_SEQUENCE, LAST_SEQUENCE, FIRST_HEAD, LAST_HEAD, FIRST_ROW, LAST_ROW, ROW_BLOCK, HEAD_GROUP,
) = range(UNIT_COLUMNS := 8)  # fmt: skip
# Columns of ``sequences``: where a sequence lies, and the number of its first saved state
BATCH_INDEX, START, LENGTH, FIRST_SAVED = range(SEQUENCE_COLUMNS := 4)
# Entries of ``sizes``
HEADS, KEY_DIM, VALUE_DIM, WIDTH, CHUNK, WEIGHT_REPEAT = range(6)

# The vector recurrences. Rows of ``tensors``: the inputs of update, forget and reset gate, y, and in the backward pass
# the gradients of y and of the inputs. ``sequences`` has a sequence's number in place of a saved state's.
X, X_FORGET, X_RESET, STATE, DSTATE, DX, DX_FORGET, DX_RESET = range(8)
NUMBER = FIRST_SAVED
# Entries of ``sizes``: HEADS, then the units V, V padded, steps and sequences staged at a time, whether there are gates
UNITS, UNITS_PADDED, STEPS, TILE, GATED = range(1, 6)

# Which module a kernel is in, and its arguments: n an integer, t a table of integers, x an array in the state's dtype
# (its address; 0 for none), d a double
KERNELS = {
    "forward": ("scan.cpu_kernels", "nnttttxxxxx"),
    "backward": ("scan.cpu_kernels", "nnttttxxxxxxxxd"),
    "apply_tanh": ("scan.cpu_kernels", "xxn"),
    "rnn_forward": ("vector_scan.cpu_kernels", "nnttttxxxx"),
    "rnn_backward": ("vector_scan.cpu_kernels", "nnttttxxxxxxxd"),
}


def scratch_size(chunk: int, rows: int, width: int, backward: bool) -> int:
    """Elements of a thread's scratch memory, whose parts the kernels lay out; rows and width are padded."""
    state, staged = rows * width, chunk * (2 * rows + 2 * width + 1)
    if not backward:
        return staged + 2 * state
    sums = 2 * rows * VECTOR_BYTES // 4
    return staged + (2 * chunk + 1) * state + chunk * (2 * rows + width + 1) + state + width * width + sums


def rnn_scratch_size(heads: int, tile: int, steps: int, width: int, gated: bool, backward: bool) -> int:
    """The same for the vector recurrences, for units of so many heads."""
    staged = (6 if gated else 3) if backward else (3 if gated else 1)
    return tile * (staged * (steps * width + VECTOR_BYTES // 4) + (heads + 1) * width)
