"""Dyck words: brackets of several kinds, nested to a bounded depth.

Language: Dyck-(k, m) of Hewitt et al., "RNNs can generate bounded hierarchical languages with optimal memory" (arXiv
2010.07515): k kinds of brackets, at most m of them open. A sequence is a walk: an opening bracket of a random kind
where none is open, a closing one where m are, else either with probability 1/2. It ends anywhere, closed or not. Hewitt
et al. score the closing brackets of a language model. Here the answer is asked for at every position, so that it is
exact: which bracket closes what is open.
"""

from dataclasses import dataclass
from math import log2
from typing import ClassVar, Literal

import numpy as np

from m2rnn.tasks.problems.contract import Batch
from m2rnn.tasks.problems.generate import Draws, ExactProblem, check_at_least, check_one_of


@dataclass(frozen=True)
class Dyck(ExactProblem):
    """After every token of a Dyck word, say what is open.

    There are ``kinds`` of brackets, nested ``depth`` deep at most. Kind i opens with token i and closes with token
    ``kinds`` + i. With ``answer="close"`` the target is the token that would close the innermost open bracket, or 2 ·
    ``kinds`` if none is open; with ``"depth"``, how many are open.
    """

    kinds: int = 8
    depth: int = 4
    answer: Literal["close", "depth"] = "close"

    source: ClassVar[str] = "Hewitt et al., arXiv 2010.07515"
    train_lengths: ClassVar[tuple[int, int]] = (128, 128)
    test_lengths: ClassVar[tuple[int, ...]] = (128, 256, 512, 1024, 2048)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, kinds=self.kinds, depth=self.depth)
        check_one_of("close", "depth", answer=self.answer)

    @property
    def name(self) -> str:
        return "dyck" if self.answer == "close" else "dyck_depth"

    @property
    def vocab_size(self) -> int:
        return max(2 * self.kinds + 1, self.depth + 1)

    def entropy(self, length: int) -> float:
        opening = (length + 1) // 2  # at least
        free = length // 4 if self.depth > 1 else 0  # choices between opening and closing, at least
        return opening * log2(self.kinds) + free

    def generate(self, draws: Draws, rows: int, length: int) -> Batch:
        opens_by_chance = draws.integers(2, length, rows) == 1
        kinds = draws.integers(self.kinds, length, rows)
        inputs = np.empty((length, rows), dtype=np.int64)
        targets = np.empty((length, rows), dtype=np.int64)
        each = np.arange(rows)
        stack = np.full((rows, self.depth + 1), self.kinds, dtype=np.int64)  # place 0: nothing is open
        depth = np.zeros(rows, dtype=np.int64)
        for t in range(length):
            opens = (depth == 0) | ((depth < self.depth) & opens_by_chance[t])
            innermost = stack[each, depth]
            depth += 2 * opens - 1
            # A closed bracket's kind is written above the stack's top, where the next opening one replaces it.
            kind = np.where(opens, kinds[t], innermost)
            stack[each, depth + ~opens] = kind
            inputs[t] = np.where(opens, kind, self.kinds + kind)
            targets[t] = depth if self.answer == "depth" else self.kinds + stack[each, depth]
        return Batch(np.ascontiguousarray(inputs.T), np.ascontiguousarray(targets.T))
