"""Palindromes: whether the second half of a sequence is the first half reversed.

The textbook context-free language w # w^R (arXiv 1805.04908 and many others use it), asked as yes or no. Half of the
sequences are palindromes. In the others exactly one symbol of the second half is another one, so that nothing short of
comparing all of them is right more often than half the time.
"""

from dataclasses import dataclass
from math import log2
from typing import ClassVar

import numpy as np

from m2rnn.tasks.problems.contract import Batch
from m2rnn.tasks.problems.generate import Draws, ExactProblem, check_at_least, ignored


@dataclass(frozen=True)
class Palindromes(ExactProblem):
    """Say whether the second half of a sequence is the first half reversed.

    After n symbols, a middle token (number ``symbols``) and n symbols: 1 for a palindrome, else 0. A sequence of even
    length begins with a middle token.
    """

    symbols: int = 4

    name: ClassVar[str] = "palindromes"
    source: ClassVar[str] = "a textbook language; this project's negatives"
    train_lengths: ClassVar[tuple[int, int]] = (3, 41)
    test_lengths: ClassVar[tuple[int, ...]] = (41, 81, 161, 321, 641)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(2, symbols=self.symbols)

    @property
    def min_length(self) -> int:
        return 3

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1

    def entropy(self, length: int) -> float:
        return 1 + (length - 1) // 2 * log2(self.symbols)

    def generate(self, draws: Draws, rows: int, length: int) -> Batch:
        count = (length - 1) // 2
        string = draws.integers(self.symbols, rows, count)
        right = draws.integers(2, rows)
        changed, by = draws.integers(count, rows), 1 + draws.integers(self.symbols - 1, rows)
        back = string[:, ::-1].copy()
        each = np.arange(rows)
        back[each, changed] = (back[each, changed] + np.where(right == 1, 0, by)) % self.symbols
        inputs, targets = np.full((rows, length), self.symbols, dtype=np.int64), ignored(rows, length)
        inputs[:, -2 * count - 1 : -count - 1], inputs[:, -count:] = string, back
        targets[:, -1] = right
        return Batch(inputs, targets)
