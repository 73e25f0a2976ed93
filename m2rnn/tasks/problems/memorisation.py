"""Memorisation: a fixed dictionary, learnt in the weights.

Protocol: MAD (Poli et al., arXiv 2403.17844), repository athms/mad-lab: 256 tokens, of which the last is the insert
token, the lower half keys and the upper values. Each key has one value in all sequences. A sequence of 32 alternates
uniform keys and the insert token, at which the value is due. MAD trains on 256 sequences. Nothing is in the context, so
train and test share the dictionary, not the sequences.
"""

from dataclasses import dataclass
from functools import cached_property
from math import log2
from typing import ClassVar

import numpy as np

from m2rnn.tasks.problems.contract import Batch, IntArray
from m2rnn.tasks.problems.generate import Draws, ExactProblem, check_at_least, ignored
from m2rnn.tasks.problems.selective_copying import MAD


@dataclass(frozen=True)
class Memorisation(ExactProblem):
    """Name each key's value in a fixed dictionary.

    It is due at the insert token after the key. ``dictionary`` draws another dictionary.
    """

    vocabulary: int = 256
    dictionary: int = 0

    name: ClassVar[str] = "memorisation"
    source: ClassVar[str] = MAD
    train_lengths: ClassVar[tuple[int, int]] = (32, 32)
    test_lengths: ClassVar[tuple[int, ...]] = (32, 64, 128)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(3, vocabulary=self.vocabulary)
        check_at_least(0, dictionary=self.dictionary)

    @property
    def min_length(self) -> int:
        return 2

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @cached_property
    def values(self) -> IntArray:
        """The value of every key: different ones for different keys."""
        keys = (self.vocabulary - 1) // 2
        order = Draws((self.dictionary, 2**63), (1, self.vocabulary, 0)).orders(1, self.vocabulary - 1 - keys)[0]
        values: IntArray = keys + order[:keys]
        return values

    def entropy(self, length: int) -> float:
        return length // 2 * log2(len(self.values))

    def generate(self, draws: Draws, rows: int, length: int) -> Batch:
        keys = draws.integers(len(self.values), rows, (length + 1) // 2)
        inputs, targets = np.full((rows, length), self.vocabulary - 1, dtype=np.int64), ignored(rows, length)
        inputs[:, 0::2] = keys
        targets[:, 1::2] = self.values[keys][:, : length // 2]
        return Batch(inputs, targets)
