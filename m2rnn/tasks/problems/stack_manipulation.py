"""Stack manipulation: a stack, instructions, and then the stack that results.

Protocol: Delétang et al. (arXiv 2207.02098). The input is a stack of bits, from bottom to top, of a height drawn
uniformly from 1 to one less than its length, and then instructions drawn uniformly; popping an empty stack does
nothing. The output is the final stack from top to bottom and its end. Inputs have 1 to 40 tokens in training and up to
500 in tests.

    tokens     0 1   bits          2   pop; as a target, the end          3 4   push 0, push 1          5   empty place
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from m2rnn.tasks.problems.automata import CHOMSKY
from m2rnn.tasks.problems.contract import IGNORED, Batch
from m2rnn.tasks.problems.generate import Draws, ExactProblem, ignored

POP, PUSH, EMPTY = 2, 3, 5
END = 2


@dataclass(frozen=True)
class StackManipulation(ExactProblem):
    """Follow instructions to a stack, and return what is on it.

    After n tokens of input, n + 1 empty places give the stack and its end; what comes after does not count. A sequence
    of even length begins with an empty place. An input of n tokens has length 2 n + 1 here; Delétang et al. give n.
    """

    name: ClassVar[str] = "stack_manipulation"
    source: ClassVar[str] = CHOMSKY
    train_lengths: ClassVar[tuple[int, int]] = (3, 81)
    test_lengths: ClassVar[tuple[int, ...]] = (81, 161, 321, 641, 1001)

    @property
    def min_length(self) -> int:
        return 3

    @property
    def vocab_size(self) -> int:
        return 6

    def entropy(self, length: int) -> float:
        return float((length - 1) // 2)  # each token is a bit, or one of three instructions

    def generate(self, draws: Draws, rows: int, length: int) -> Batch:
        count = (length - 1) // 2
        height = 1 + draws.integers(max(count - 1, 1), rows)
        bits = draws.integers(2, rows, count)
        given = np.arange(count) < height[:, None]
        tokens = np.where(given, bits, POP + draws.integers(3, rows, count))
        stack, each = np.where(given, bits, 0), np.arange(rows)
        for token in tokens.T:
            push, pop = token >= PUSH, (token == POP) & (height > 0)
            stack[each[push], height[push]] = token[push] - PUSH
            height = height + push - pop
        inputs, targets = np.full((rows, length), EMPTY, dtype=np.int64), ignored(rows, length)
        inputs[:, -2 * count - 1 : -count - 1] = tokens
        from_top = height[:, None] - 1 - np.arange(count + 1)
        popped = np.take_along_axis(stack, np.maximum(from_top, 0), axis=1)
        targets[:, -count - 1 :] = np.where(from_top >= 0, popped, np.where(from_top == -1, END, IGNORED))
        return Batch(inputs, targets)
