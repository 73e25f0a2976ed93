"""Multi-query associative recall: pairs of key and value, then the keys again, each to be answered by its value.

Protocol: Arora et al., "Zoology: Measuring and improving recall in efficient language models" (arXiv 2312.04927),
repository HazyResearch/zoology. The vocabulary has 8,192 tokens: keys from the lower half, values from the upper. The
pairs come first. Of the remaining places, counted in twos, the queries take random ones without repetition, of which
place i has weight i^(a - 1) with a = 0.01, so most queries come early. Everything between them is a random token, or
token 0 in the first paper.

The grid of "Simple linear attention language models" (Based, arXiv 2402.18668) in pairs: trained at length 64 with 4,
at 128 with 8, at 256 with 16, 32 and 64; tested at 64 with 4, 8 and 16, at 128 with 32, 256 with 64, 512 with 128 and
1,024 with 256. `TRAIN_GRID` and `TEST_GRID` list it. Models have two layers; the learning rate is swept, and recurrent
models have a narrow optimum.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log2
from typing import ClassVar, Literal

import numpy as np

from m2rnn.tasks.problems.contract import Batch, Problem
from m2rnn.tasks.problems.generate import Draws, ExactProblem, check_at_least, check_one_of, ignored

TRAIN_GRID = [(64, 4), (128, 8), (256, 16), (256, 32), (256, 64)]  # (length, pairs)
TEST_GRID = [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]
TOKENS_PER_PAIR = (16, 8, 4)  # the grid's three densities


@dataclass(frozen=True)
class MQAR(ExactProblem):
    """Recall the value of every key that comes again.

    ``pairs`` is a number of pairs, cut to what fits: four tokens each. By default a third of the sequences each has a
    sixteenth, an eighth and a quarter of the length: the reference's training grid at 256 and test grid at 64.
    """

    vocabulary: int = 8192
    pairs: int | None = None
    filler: Literal["random", "zero"] = "random"
    power: float = 0.01

    name: ClassVar[str] = "mqar"
    source: ClassVar[str] = "Arora et al., arXiv 2312.04927 and 2402.18668; HazyResearch/zoology"
    train_lengths: ClassVar[tuple[int, int]] = (64, 256)
    test_lengths: ClassVar[tuple[int, ...]] = (64, 128, 256, 512, 1024)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(4, vocabulary=self.vocabulary)
        check_at_least(1, pairs=1 if self.pairs is None else self.pairs)
        check_one_of("random", "zero", filler=self.filler)
        if not 0 < self.power <= 1:
            raise ValueError(f"power {self.power}: expected a number above 0, and 1 at most, where places are uniform")

    @property
    def min_length(self) -> int:
        return 4

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def variants(self) -> Mapping[str, Problem]:
        """The reference's numbers of pairs, as far as they are other than this problem's."""
        return {f"{pairs} pairs": replace(self, pairs=pairs) for pairs in (4, 8, 16, 32, 64, 128, 256)}

    def pairs_at(self, length: int) -> list[int]:
        """The numbers of pairs that sequences of this length have, in equal shares."""
        wanted = [length // tokens for tokens in TOKENS_PER_PAIR] if self.pairs is None else [self.pairs]
        most = min(length // 4, self.vocabulary // 2 - 1)
        return sorted({min(max(pairs, 1), most) for pairs in wanted})

    def entropy(self, length: int) -> float:
        choices = self.pairs_at(length)
        keys, values = self.vocabulary // 2 - 1, self.vocabulary - self.vocabulary // 2
        drawn = range(choices[0])
        return log2(len(choices)) + sum(log2(keys - i) + log2(values - i) for i in drawn)

    def generate(self, draws: Draws, rows: int, length: int) -> Batch:
        choices = self.pairs_at(length)
        shares = [rows // len(choices) + (i < rows % len(choices)) for i in range(len(choices))]
        parts = [self._generate(draws, share, length, pairs) for share, pairs in zip(shares, choices, strict=True)]
        order = draws.orders(1, rows)[0]
        inputs, targets = (np.concatenate(part)[order] for part in zip(*parts, strict=True))
        return Batch(inputs, targets)

    def _generate(self, draws: Draws, rows: int, length: int, pairs: int) -> Batch:
        half = self.vocabulary // 2
        keys = 1 + draws.distinct(half - 1, rows, pairs)
        values = half + draws.distinct(self.vocabulary - half, rows, pairs)
        places = (length - 2 * pairs) // 2
        # The order in which exponential clocks of rates p ring is that of drawing with weights p without repetition.
        uniform = ((draws.bits(rows, places) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        rates = np.arange(1, places + 1) ** (self.power - 1)
        first_to_ring = np.argsort(-np.log(uniform) / rates, axis=1)[:, :pairs]
        asked = 2 * pairs + 2 * first_to_ring
        inputs, targets = np.zeros((rows, length), dtype=np.int64), ignored(rows, length)
        if self.filler == "random":
            inputs[:, 2 * pairs :] = draws.integers(self.vocabulary, rows, length - 2 * pairs)
        inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
        np.put_along_axis(inputs, asked, keys, axis=1)
        np.put_along_axis(targets, asked, values, axis=1)
        return Batch(inputs, targets)
