"""Selective copying: repeat the symbols of a sequence and leave out the blanks between them.

Protocol: MAD, "Mechanistic Design and Scaling of Hybrid Architectures" (Poli et al., arXiv 2403.17844), repository
athms/mad-lab. 16 of 256 tokens are to be copied, from a vocabulary of 16, of which two are the blank and the copy
token. Every blank goes before a symbol that is drawn uniformly, so the last symbol is always right before the copy
token. The answers are due at as many blanks after it, and never shown. MAD trains on 12,800 sequences.
"""

from dataclasses import dataclass
from math import log2
from typing import ClassVar

import numpy as np

from m2rnn.tasks.problems.contract import Batch
from m2rnn.tasks.problems.generate import Draws, ExactProblem, check_at_least, ignored

MAD = "Poli et al., arXiv 2403.17844; athms/mad-lab"


@dataclass(frozen=True)
class SelectiveCopying(ExactProblem):
    """Copy the symbols of a sequence without the blanks between them.

    There are ``count`` symbols, or as many as fit if the sequence is shorter than 2 · ``count`` + 1.

    Tokens: the symbols, then the blank, ``vocabulary`` - 2, and the copy token, ``vocabulary`` - 1.
    """

    vocabulary: int = 16
    count: int = 16

    name: ClassVar[str] = "selective_copying"
    source: ClassVar[str] = MAD
    train_lengths: ClassVar[tuple[int, int]] = (256, 256)
    test_lengths: ClassVar[tuple[int, ...]] = (256, 512, 1024, 2048, 4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(3, vocabulary=self.vocabulary)
        check_at_least(1, count=self.count)

    @property
    def min_length(self) -> int:
        return 3

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def _count(self, length: int) -> int:
        return min(self.count, (length - 1) // 2)

    def entropy(self, length: int) -> float:
        # Of the blanks' places only how many come before the first symbol: about half a bit each, while there are any.
        count = self._count(length)
        spread = 0.0 if count == 1 else log2(length - 2 * count) / 2
        return count * log2(self.vocabulary - 2) + spread

    def generate(self, draws: Draws, rows: int, length: int) -> Batch:
        count = self._count(length)
        blanks = length - 2 * count - 1
        symbols = draws.integers(self.vocabulary - 2, rows, count)
        before = draws.integers(count, rows, blanks)  # which symbol
        flat = (before + count * np.arange(rows)[:, None]).ravel()
        blanks_before = np.bincount(flat, minlength=rows * count).reshape(rows, count).cumsum(axis=1)
        inputs, targets = np.full((rows, length), self.vocabulary - 2, dtype=np.int64), ignored(rows, length)
        np.put_along_axis(inputs, blanks_before + np.arange(count), symbols, axis=1)
        inputs[:, -count - 1] = self.vocabulary - 1
        targets[:, -count:] = symbols
        return Batch(inputs, targets)
