"""Flip-flop: one bit is written, ignored data pass by, and the bit is read.

Protocol: Liu et al., "Exposing Attention Glitches with Flip-Flop Language Modeling" (arXiv 2306.00946). A sequence of
512 tokens alternates instructions and bits. The first instruction is a write, the last a read; each of the others is
"ignore" with probability p, else a write or a read with equal chances. Bits are uniform, but after a read comes the bit
last written. Models train with p = 0.8 and are tested with p = 0.98, where a bit is kept for long, and p = 0.1, where
it changes often. Transformers have a long tail of rare errors there, so count errors (``Score.errors``), not percent.

    tokens     0 1   bits          2   write          3   read          4   ignore
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from m2rnn.tasks.problems.contract import IGNORED, Batch, Problem
from m2rnn.tasks.problems.generate import Draws, ExactProblem, check_probability

WRITE, READ, IGNORE = 2, 3, 4
SPARSE, DENSE = 0.98, 0.1


@dataclass(frozen=True)
class FlipFlop(ExactProblem):
    """Name the bit last written, at every read.

    ``ignore`` is the probability of an instruction to ignore.
    """

    ignore: float = 0.8

    name: ClassVar[str] = "flip_flop"
    source: ClassVar[str] = "Liu et al., arXiv 2306.00946"
    train_lengths: ClassVar[tuple[int, int]] = (512, 512)
    test_lengths: ClassVar[tuple[int, ...]] = (512, 1024, 2048, 4096, 8192)
    min_length: ClassVar[int] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability(ignore=self.ignore)

    @property
    def vocab_size(self) -> int:
        return 5

    def variants(self) -> Mapping[str, Problem]:
        """Sparse, where a bit is kept for long, and dense, where it changes often."""
        return {"sparse": replace(self, ignore=SPARSE), "dense": replace(self, ignore=DENSE)}

    def entropy(self, length: int) -> float:
        instructions = (length + 1) // 2  # each with a random bit, unless it is a read, as the last one is
        return (instructions - 1) * (1 + self.ignore) / 2

    def generate(self, draws: Draws, rows: int, length: int) -> Batch:
        count = (length + 1) // 2
        write_or_read = WRITE + draws.integers(2, rows, count)
        instructions = np.where(draws.happens(self.ignore, rows, count), IGNORE, write_or_read)
        instructions[:, 0], instructions[:, -1] = WRITE, READ
        bits = draws.integers(2, rows, count)
        written_at = np.maximum.accumulate(np.where(instructions == WRITE, np.arange(count), 0), axis=1)
        answers = np.take_along_axis(bits, written_at, axis=1)
        reads = instructions == READ
        inputs = np.empty((rows, 2 * count), dtype=np.int64)
        inputs[:, 0::2], inputs[:, 1::2] = instructions, np.where(reads, answers, bits)
        targets = np.full((rows, 2 * count), IGNORED, dtype=np.int64)
        targets[:, 0::2][reads] = answers[reads]
        return Batch(inputs[:, :length], targets[:, :length])
