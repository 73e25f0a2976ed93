"""Compression: keep a whole sequence in the state, and give it back.

Protocol: MAD (Poli et al., arXiv 2403.17844), repository athms/mad-lab: 15 symbols and a compression token, which ends
the sequence of 32. MAD reads every symbol from the model's output at the compression token alone, by an MLP that is
told the position. So that any language model can be tested, here empty places follow instead, one for each symbol; the
answers are never shown. A model with attention may look back from them, so only figures of recurrent models tell what
MAD's do.
"""

from dataclasses import dataclass
from math import log2
from typing import ClassVar

import numpy as np

from m2rnn.tasks.problems.contract import Batch
from m2rnn.tasks.problems.generate import Draws, ExactProblem, check_at_least, ignored
from m2rnn.tasks.problems.selective_copying import MAD


@dataclass(frozen=True)
class Compression(ExactProblem):
    """Keep a whole sequence in the state, and give it back.

    There are n symbols, the compression token (number ``symbols``), and n empty places (``symbols`` + 1). MAD's 31
    symbols have length 63 here. A sequence of even length begins with an empty place.
    """

    symbols: int = 15

    name: ClassVar[str] = "compression"
    source: ClassVar[str] = MAD
    train_lengths: ClassVar[tuple[int, int]] = (63, 63)
    test_lengths: ClassVar[tuple[int, ...]] = (63, 127, 255, 511)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, symbols=self.symbols)

    @property
    def min_length(self) -> int:
        return 3

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    def entropy(self, length: int) -> float:
        return (length - 1) // 2 * log2(self.symbols)

    def generate(self, draws: Draws, rows: int, length: int) -> Batch:
        count = (length - 1) // 2
        string = draws.integers(self.symbols, rows, count)
        inputs, targets = np.full((rows, length), self.symbols + 1, dtype=np.int64), ignored(rows, length)
        inputs[:, -2 * count - 1 : -count - 1] = string
        inputs[:, -count - 1] = self.symbols
        targets[:, -count:] = string
        return Batch(inputs, targets)
