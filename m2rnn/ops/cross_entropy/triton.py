"""The kernel of ``linear_cross_entropy``: logits in, their gradient out, in the same memory."""

import triton
import triton.language as tl
from torch import Tensor

from m2rnn.ops.backends.triton import on_device_of

BLOCK = 4096  # columns at a time
WARPS = 8


def to_gradient_(logits: Tensor, labels: Tensor, losses: Tensor, vocabulary: int) -> None:
    """Write each row's ``logsumexp(row) - row[label]``, and over the row that one's gradient.

    That is ``softmax(row) - one_hot(label)``.

    Args:
        logits: ``[n, columns]``, contiguous.
        labels: int64 ``[n]``; -100 gives zeros, another number that is no column NaN.
        losses: float32 ``[n]``, written.
        vocabulary: columns that count; those after them get zeros.
    """
    assert logits.is_contiguous()
    assert losses.is_contiguous()
    if logits.shape[0]:
        labels = labels.contiguous()
        with on_device_of(logits):
            _to_gradient[(logits.shape[0],)](
                logits, labels, losses, logits.shape[1], vocabulary, BLOCK=BLOCK, num_warps=WARPS
            )


@triton.jit
def _to_gradient(logits, labels, losses, columns, vocabulary, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * columns
    label = tl.load(labels + row)
    known = (label >= 0) & (label < vocabulary)
    # Before the reductions below, whose barriers keep the writes at the end behind it
    at_label = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32)

    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, columns, BLOCK):
        x, column = _load(logits, start, columns, vocabulary, BLOCK)
        before, largest = largest, tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), 0)

    counts = label != -100
    tl.store(losses + row, tl.where(counts, largest - at_label + tl.log(total), 0.0))
    share = 1 / total
    for start in range(0, columns, BLOCK):
        x, column = _load(logits, start, columns, vocabulary, BLOCK)
        gradient = tl.exp(x - largest) * share - tl.where(column == label, 1.0, 0.0)
        gradient = tl.where(counts, gradient, 0.0).to(logits.dtype.element_ty)
        tl.store(logits + column, gradient, mask=column < columns)


@triton.jit
def _load(logits, start, columns, vocabulary, BLOCK: tl.constexpr):
    """A block in float32, -inf in columns that do not count: ``columns`` is round, so that loads are 16 bytes wide."""
    column = start + tl.arange(0, BLOCK)
    x = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32)
    return tl.where(column < vocabulary, x, float("-inf")), column
