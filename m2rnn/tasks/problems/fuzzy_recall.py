"""Fuzzy in-context recall: keys and values of one to three tokens.

Protocol: MAD (Poli et al., arXiv 2403.17844), repository athms/mad-lab: 16 tokens, of which one fills up in front, 7
make keys and 8 values. A key or value is one to three different tokens; its size is uniform, then its tokens. Each
sequence has its own value for every key, and ends with a key that has come before. Every value but a key's first is to
be recalled. Length 128. In MAD's test, and in the variant "longest keys", all keys have three tokens. MAD trains on all
next tokens; here only recalled values count, and the key that is asked last is one of those that came at random.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import permutations
from math import log2
from typing import ClassVar

import numpy as np

from m2rnn.tasks.problems.contract import IGNORED, Batch, IntArray, Problem
from m2rnn.tasks.problems.generate import Draws, ExactProblem, check_at_least
from m2rnn.tasks.problems.in_context_recall import first_places
from m2rnn.tasks.problems.selective_copying import MAD


@dataclass(frozen=True)
class FuzzyRecall(ExactProblem):
    """Recall the value of each key that has come before, both of one to three tokens.

    A value is due token by token, from its key's last token on. Keys are made of tokens from 0, values of those after
    them; the last of ``vocabulary`` fills up in front. ``size`` is the number of tokens of a key or value at most; with
    ``longest_keys`` all keys have that many.
    """

    vocabulary: int = 16
    size: int = 3
    longest_keys: bool = False

    name: ClassVar[str] = "fuzzy_recall"
    source: ClassVar[str] = MAD
    train_lengths: ClassVar[tuple[int, int]] = (128, 128)
    test_lengths: ClassVar[tuple[int, ...]] = (128, 256, 512, 1024)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, size=self.size)
        check_at_least(2 * self.size + 1, vocabulary=self.vocabulary)

    @property
    def min_length(self) -> int:
        return 4 * self.size - 1

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def variants(self) -> Mapping[str, Problem]:
        """All keys of the largest size, which is how MAD tests."""
        return {"longest keys": replace(self, longest_keys=True)}

    @property
    def _key_tokens(self) -> int:
        return (self.vocabulary - 1) // 2

    def entropy(self, length: int) -> float:
        pairs = (length + 1) // (2 * self.size) - 1  # at least
        return (pairs - 1) * log2(self._key_tokens) + log2(self.vocabulary - 1 - self._key_tokens)

    def generate(self, draws: Draws, rows: int, length: int) -> Batch:
        total, most = length + 1, (length + 1) // 2  # tokens, with the one that is only a target; pairs at most
        keys, key_sizes = _motifs(0, self._key_tokens, self.size)
        values, value_sizes = _motifs(self._key_tokens, self.vocabulary - 1, self.size)
        smallest_key = self.size if self.longest_keys else 1
        key = _draw_motifs(draws, rows, most, key_sizes, smallest_key)
        first = first_places(key, len(keys))
        value = np.take_along_axis(_draw_motifs(draws, rows, most, value_sizes, 1), first, axis=1)
        ends = (key_sizes[key] + value_sizes[value]).cumsum(axis=1)
        fits = (ends <= total - 2 * self.size).sum(axis=1)  # pairs that leave room for any last one
        each, asked = np.arange(rows), draws.integers(fits, rows)
        last_key, last_value = key[each, asked], value[each, asked]
        last_size = key_sizes[last_key] + value_sizes[last_value]
        key[each, fits], value[each, fits] = last_key, last_value
        first[each, fits] = -1  # come before, whichever it is
        ends[each, fits] = ends[each, fits - 1] + last_size
        start = ends - key_sizes[key] - value_sizes[value] + (total - ends[each, fits])[:, None]
        there = np.arange(most) <= fits[:, None]
        recalled = there & (first < np.arange(most))
        tokens = np.full((rows, total), self.vocabulary - 1, dtype=np.int64)
        targets = np.full((rows, total), IGNORED, dtype=np.int64)
        for i in range(self.size):
            row, place = np.nonzero(there & (key_sizes[key] > i))
            tokens[row, start[row, place] + i] = keys[key[row, place], i]
            row, place = np.nonzero(there & (value_sizes[value] > i))
            at = start[row, place] + key_sizes[key[row, place]] + i
            tokens[row, at] = values[value[row, place], i]
            again = recalled[row, place]
            targets[row[again], at[again]] = values[value[row, place], i][again]
        return Batch(tokens[:, :-1], targets[:, 1:])


def _motifs(start: int, stop: int, most: int) -> tuple[IntArray, IntArray]:
    """All sequences of 1 … ``most`` different tokens from ``start`` to ``stop`` - 1, by size, and their sizes.

    [M, most], filled up with zeros, and [M].
    """
    motifs = [motif for size in range(1, most + 1) for motif in permutations(range(start, stop), size)]
    filled = np.array([motif + (0,) * (most - len(motif)) for motif in motifs])
    return filled, np.array([len(motif) for motif in motifs])


def _draw_motifs(draws: Draws, rows: int, count: int, sizes: IntArray, smallest: int) -> IntArray:
    """Numbers of motifs [rows, count]: a uniform size from ``smallest`` on, then a uniform motif of it."""
    starts = np.searchsorted(sizes, np.arange(1, sizes[-1] + 2))
    size = smallest - 1 + draws.integers(int(sizes[-1]) - smallest + 1, rows, count)
    return starts[size] + draws.integers(np.diff(starts)[size], rows, count)
