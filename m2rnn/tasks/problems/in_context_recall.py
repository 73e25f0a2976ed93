"""In-context recall: pairs of key and value, in which keys come again, with or without noise between the pairs.

Protocol: MAD (Poli et al., arXiv 2403.17844), repository athms/mad-lab: 16 tokens, half of them keys and half values;
each sequence has its own random value for every key; keys are drawn uniformly, and the last is one that has come
before. Every value but a key's first is to be recalled. Length 128, 12,800 sequences. The noisy task replaces a fifth
of the pairs by two tokens of another vocabulary of 16. MAD trains on all next tokens and scores the recalled values;
here only those count.
"""

from dataclasses import dataclass
from math import log2
from typing import ClassVar

import numpy as np

from m2rnn.tasks.problems.contract import Batch
from m2rnn.tasks.problems.generate import Draws, ExactProblem, check_at_least, check_probability, ignored
from m2rnn.tasks.problems.selective_copying import MAD


@dataclass(frozen=True)
class InContextRecall(ExactProblem):
    """Recall the value of each key that has come before, at the key.

    ``noise`` is the probability of noise in a pair's place, of ``noise_symbols`` tokens, which follow the ``symbols``.
    At least one pair of each sequence is none.
    """

    symbols: int = 16
    noise: float = 0.0
    noise_symbols: int = 16

    source: ClassVar[str] = MAD
    train_lengths: ClassVar[tuple[int, int]] = (128, 128)
    test_lengths: ClassVar[tuple[int, ...]] = (128, 256, 512, 1024)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(2, symbols=self.symbols)
        check_at_least(1, noise_symbols=self.noise_symbols)
        check_probability(noise=self.noise)

    @property
    def name(self) -> str:
        return "noisy_recall" if self.noise else "in_context_recall"

    @property
    def min_length(self) -> int:
        return 3

    @property
    def vocab_size(self) -> int:
        return self.symbols + (self.noise_symbols if self.noise else 0)

    def entropy(self, length: int) -> float:
        pairs = (length + 1) // 2
        values = self.symbols - self.symbols // 2
        keys_alone = (1 - self.noise) * (pairs - 2) * log2(self.symbols // 2)
        return keys_alone + self.noise * (pairs - 2) * 2 * log2(self.noise_symbols) + log2(values)

    def generate(self, draws: Draws, rows: int, length: int) -> Batch:
        pairs, kinds = (length + 1) // 2, self.symbols // 2
        keys = draws.integers(kinds, rows, pairs)
        values = kinds + draws.integers(self.symbols - kinds, rows, kinds)
        noisy = draws.happens(self.noise, rows, pairs)
        each = np.arange(rows)
        certain = draws.integers(pairs - 1, rows)
        noisy[each, certain] = noisy[:, -1] = False
        # The last key is that of a pair drawn uniformly from those before it, by the clock that rings first.
        clocks = np.where(noisy[:, :-1], np.uint64(2**64 - 1), draws.bits(rows, pairs - 1))
        keys[:, -1] = keys[each, clocks.argmin(axis=1)]
        tokens = np.stack([keys, np.take_along_axis(values, keys, axis=1)], axis=2)
        come_before = (first_places(np.where(noisy, kinds, keys), kinds + 1) < np.arange(pairs)) & ~noisy
        targets = ignored(rows, 2 * pairs)
        targets[:, 0::2][come_before] = tokens[come_before, 1]
        if self.noise:
            tokens[noisy] = self.symbols + draws.integers(self.noise_symbols, *tokens[noisy].shape)
        return Batch(tokens.reshape(rows, 2 * pairs)[:, :length], targets[:, :length])


def first_places(numbers: np.ndarray, below: int) -> np.ndarray:
    """For every entry of ``numbers`` [N, K], the first place in its row that has the same number."""
    rows, count = numbers.shape
    first = np.empty((rows, below), dtype=np.int64)
    for place in reversed(range(count)):  # what is written last stays
        first[np.arange(rows), numbers[:, place]] = place
    return np.take_along_axis(first, numbers, axis=1)
