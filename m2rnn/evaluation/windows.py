"""Windows: the parts of documents that a model reads from an empty state, and which of their tokens it predicts.

A window reads ``tokens[start : stop - 1]`` and is scored on ``tokens[first : stop]``; what lies between ``start`` and
``first`` is context only. No window crosses the end of a document. The first token of a document is predicted by none,
every other one by exactly one window of `sliding` or `packed`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Windows:
    """``start < first < stop`` of each window, int64 ``[n]``, indices into all tokens."""

    start: NDArray[np.int64]
    first: NDArray[np.int64]
    stop: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.start)

    @property
    def num_scored(self) -> int:
        """How many tokens are predicted."""
        return int((self.stop - self.first).sum())

    @property
    def num_read(self) -> int:
        """How many tokens the model reads for that."""
        return int((self.stop - self.start).sum()) - len(self)


def sliding(ends: NDArray[np.int64], context: int, stride: int) -> Windows:
    """Windows of ``context`` tokens, one every ``stride`` tokens of a document, each scored on what is new in it.

    Every prediction but a document's first ``context`` sees at least ``context - stride + 1`` tokens. With
    ``stride = context`` they do not overlap; with ``context`` as long as a document, it is one window.

    Args:
        ends: index after the last token of each document.

    Raises:
        ValueError: unless 1 ≤ stride ≤ context.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"stride {stride}: expected 1 to the context, which is {context}")
    found: list[tuple[int, int, int]] = []
    begin = 0
    for end in map(int, ends):
        first = begin + 1
        for start in range(begin, end - 1, stride):
            stop = min(start + context + 1, end)
            found.append((start, first, stop))
            first = stop
            if stop == end:
                break
        begin = end
    return _windows(found)


def packed(ends: NDArray[np.int64], context: int) -> Windows:
    """What a model is trained on: all documents end to end, cut every ``context`` tokens.

    A window starts with each document and after each cut.
    """
    found: list[tuple[int, int, int]] = []
    begin = 0
    for end in map(int, ends):
        cuts = range(begin // context * context + context, end, context)
        for start, cut in zip([begin, *cuts], [*cuts, end], strict=True):
            stop = min(cut + 1, end)
            if start + 1 < stop:
                found.append((start, start + 1, stop))
        begin = end
    return _windows(found)


def whole(ends: NDArray[np.int64], length: int) -> Windows:
    """Windows that all read ``length`` tokens and do not overlap; the rests of documents are left out.

    At every position the same windows are averaged over, so that differences are due to the position alone.
    """
    found: list[tuple[int, int, int]] = []
    begin = 0
    for end in map(int, ends):
        found += [(start, start + 1, start + length + 1) for start in range(begin, end - length, length)]
        begin = end
    return _windows(found)


def _windows(found: list[tuple[int, int, int]]) -> Windows:
    start, first, stop = np.array(found, np.int64).reshape(-1, 3).T
    return Windows(start, first, stop)
