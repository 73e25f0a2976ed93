"""Needle in a haystack: among random tokens, the one that follows a marker.

Task: the passkey of Mohtashami and Jaggi (arXiv 2305.16300) and the needles of RULER (arXiv 2404.06654), which hide a
sentence in English text; here with tokens.
"""

from dataclasses import dataclass
from math import log2
from typing import ClassVar

import numpy as np

from m2rnn.tasks.problems.contract import Batch
from m2rnn.tasks.problems.generate import Draws, ExactProblem, check_at_least, ignored


@dataclass(frozen=True)
class Needle(ExactProblem):
    """Recall the token that followed a marker, among random tokens.

    The haystack is of ``symbols`` different tokens, with ``needles`` hidden in it, fewer where they do not fit. A
    needle is one of ``needles`` markers, each of which occurs once, and a symbol after it. The last token is one of the
    markers again; the answer is the symbol that followed it. Needles lie anywhere with the same probability. Markers
    are the tokens from ``symbols`` on.
    """

    symbols: int = 64
    needles: int = 4

    name: ClassVar[str] = "needle"
    source: ClassVar[str] = "Mohtashami and Jaggi, arXiv 2305.16300; RULER, arXiv 2404.06654; tokens instead of English"
    train_lengths: ClassVar[tuple[int, int]] = (256, 256)
    test_lengths: ClassVar[tuple[int, ...]] = (256, 512, 1024, 2048, 4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, symbols=self.symbols, needles=self.needles)

    @property
    def min_length(self) -> int:
        return 3

    @property
    def vocab_size(self) -> int:
        return self.symbols + self.needles

    def _needles(self, length: int) -> int:
        return min(self.needles, (length - 1) // 2)

    def entropy(self, length: int) -> float:
        needles = self._needles(length)
        return (length - 1 - needles) * log2(self.symbols) + log2(needles)

    def generate(self, draws: Draws, rows: int, length: int) -> Batch:
        needles = self._needles(length)
        inputs, targets = np.empty((rows, length), dtype=np.int64), ignored(rows, length)
        inputs[:, :-1] = draws.integers(self.symbols, rows, length - 1)
        # Places among a haystack whose needles are one token each, then moved apart.
        places = np.sort(draws.distinct(length - 1 - needles, rows, needles), axis=1) + np.arange(needles)
        markers = self.symbols + draws.distinct(self.needles, rows, needles)
        np.put_along_axis(inputs, places, markers, axis=1)
        each, asked = np.arange(rows), draws.integers(needles, rows)
        inputs[:, -1] = markers[each, asked]
        targets[:, -1] = inputs[each, places[each, asked] + 1]
        return Batch(inputs, targets)
