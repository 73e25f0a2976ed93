"""Copying and reversing a string of random symbols.

Protocols. Copying: Jelassi et al., "Repeat After Me" (arXiv 2402.01032): random letters, a copy token, and the letters
again, predicted one after the other, each from those before it. Reversing: Delétang et al. (arXiv 2207.02098): random
bits, and then as many empty places, at which the answers are due and never shown.
"""

from dataclasses import dataclass
from math import log2
from typing import ClassVar

import numpy as np

from m2rnn.tasks.problems.automata import CHOMSKY
from m2rnn.tasks.problems.contract import Batch
from m2rnn.tasks.problems.generate import Draws, ExactProblem, check_at_least, ignored


@dataclass(frozen=True)
class Copying(ExactProblem):
    """Repeat a string of random symbols: x_1 … x_n copy x_1 … x_(n-1).

    The copy token is number ``symbols``. The answers are due from the copy token on, where each is the next token. An
    odd length shows the last one too.
    """

    symbols: int = 26

    name: ClassVar[str] = "copying"
    source: ClassVar[str] = "Jelassi et al., arXiv 2402.01032"
    train_lengths: ClassVar[tuple[int, int]] = (2, 128)
    test_lengths: ClassVar[tuple[int, ...]] = (128, 256, 512, 1024)

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
        inputs[:, :count] = string
        inputs[:, count + 1 :] = string[:, : length - count - 1]
        targets[:, count : 2 * count] = string
        return Batch(inputs, targets)


@dataclass(frozen=True)
class Reversing(ExactProblem):
    """Return a string of random symbols in reverse order.

    The answers to n symbols are due at n empty places: token ``symbols``, which begins an odd length too. A string of n
    symbols has length 2 n here; Delétang et al. give n.
    """

    symbols: int = 2

    name: ClassVar[str] = "reversing"
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
        targets[:, -count:] = string[:, ::-1]
        return Batch(inputs, targets)
