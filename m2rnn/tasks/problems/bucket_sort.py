"""Bucket sort: return random symbols in increasing order.

Protocol: Delétang et al. (arXiv 2207.02098): five symbols, strings of 1 to 40 in training and up to 500 in tests, and
then as many empty places, at which the answers are due and never shown.
"""

from dataclasses import dataclass
from math import log2
from typing import ClassVar

import numpy as np

from m2rnn.tasks.problems.automata import CHOMSKY
from m2rnn.tasks.problems.contract import Batch
from m2rnn.tasks.problems.generate import Draws, ExactProblem, check_at_least, ignored


@dataclass(frozen=True)
class BucketSort(ExactProblem):
    """Return random symbols in increasing order.

    There are n symbols, then n empty places: token ``symbols``, with which an odd length begins too.
    """

    symbols: int = 5

    name: ClassVar[str] = "bucket_sort"
    source: ClassVar[str] = CHOMSKY
    train_lengths: ClassVar[tuple[int, int]] = (2, 80)
    test_lengths: ClassVar[tuple[int, ...]] = (80, 160, 320, 640, 1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, symbols=self.symbols)

    @property
    def min_length(self) -> int:
        return 2

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1

    def entropy(self, length: int) -> float:
        return length // 2 * log2(self.symbols)

    def generate(self, draws: Draws, rows: int, length: int) -> Batch:
        count = length // 2
        string = draws.integers(self.symbols, rows, count)
        inputs, targets = np.full((rows, length), self.symbols, dtype=np.int64), ignored(rows, length)
        inputs[:, -2 * count : -count] = string
        targets[:, -count:] = np.sort(string, axis=1)
        return Batch(inputs, targets)
