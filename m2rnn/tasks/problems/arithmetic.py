"""Arithmetic modulo a small number, without and with brackets.

Protocol: Delétang et al., "Neural Networks and the Chomsky Hierarchy" (arXiv 2207.02098). The modulus is 5; the answer
is the value of the whole expression, at its last token; training lengths are drawn from 1 to 40, tests go to 500.

    tokens     0 … modulus - 1   numbers          modulus + 1   -                modulus + 3   (, or the blank
               modulus           +                modulus + 2   *                modulus + 4   )
"""

from dataclasses import dataclass
from math import ceil, log2
from typing import ClassVar

import numpy as np

from m2rnn.tasks.problems.automata import CHOMSKY, Answers, only_last
from m2rnn.tasks.problems.contract import Batch, IntArray
from m2rnn.tasks.problems.generate import Draws, ExactProblem, check_at_least, check_one_of, ignored

PLUS, MINUS, TIMES = 0, 1, 2  # beyond the numbers
BLANK = OPEN = 3
CLOSE = 4


@dataclass(frozen=True)
class ModularArithmetic(ExactProblem):
    """The value of an expression such as 1 + 2 * 3 - 4, modulo a small number.

    Numbers and operators, drawn uniformly, alternate; products bind more strongly than sums. Even lengths begin with a
    blank. ``answers="all"`` asks at every number for the value of the expression that ends there.
    """

    modulus: int = 5
    answers: Answers = "last"

    name: ClassVar[str] = "modular_arithmetic"
    source: ClassVar[str] = CHOMSKY
    train_lengths: ClassVar[tuple[int, int]] = (1, 40)
    test_lengths: ClassVar[tuple[int, ...]] = (40, 80, 160, 320, 500)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(2, modulus=self.modulus)
        check_one_of("last", "all", answers=self.answers)

    @property
    def vocab_size(self) -> int:
        return self.modulus + 4

    def entropy(self, length: int) -> float:
        operators = (length - 1) // 2
        return (operators + 1) * log2(self.modulus) + operators * log2(3)

    def generate(self, draws: Draws, rows: int, length: int) -> Batch:
        first = (length - 1) % 2
        numbers = draws.integers(self.modulus, rows, (length + 1) // 2)
        operators = draws.integers(3, rows, (length - 1) // 2)
        inputs = np.full((rows, length), self.modulus + BLANK, dtype=np.int64)
        inputs[:, first::2] = numbers
        inputs[:, first + 1 :: 2] = self.modulus + operators
        targets = ignored(rows, length)
        targets[:, first::2] = self._values(numbers, operators)
        return Batch(inputs, only_last(targets) if self.answers == "last" else targets)

    def _values(self, numbers: IntArray, operators: IntArray) -> IntArray:
        """The value at each of the ``numbers`` [N, K] of the expression so far."""
        values = np.empty_like(numbers)
        finished, product = np.zeros(len(numbers), dtype=np.int64), numbers[:, 0]
        values[:, 0] = product
        for k in range(1, numbers.shape[1]):
            number, operator = numbers[:, k], operators[:, k - 1]
            times = operator == TIMES
            finished = np.where(times, finished, (finished + product) % self.modulus)
            product = np.where(times, product * number, np.where(operator == MINUS, -number, number)) % self.modulus
            values[:, k] = (finished + product) % self.modulus
        return values


@dataclass(frozen=True)
class ModularArithmeticBrackets(ExactProblem):
    """The value of a nested expression such as ((2+(-3))-4), modulo a small number.

    An expression of fewer than five tokens is a number d, -d, (d) or (-d). A longer one is (left operator right), where
    the length of the left part is uniform and each part is drawn in the same way. Operators are + and -, with
    ``products`` * as well.
    """

    modulus: int = 5
    products: bool = False

    name: ClassVar[str] = "modular_arithmetic_brackets"
    source: ClassVar[str] = CHOMSKY
    train_lengths: ClassVar[tuple[int, int]] = (1, 40)
    test_lengths: ClassVar[tuple[int, ...]] = (40, 80, 160, 320, 500)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(2, modulus=self.modulus)

    @property
    def vocab_size(self) -> int:
        return self.modulus + 5

    def entropy(self, length: int) -> float:
        numbers = ceil((length + 3) / 7)  # at least: each is in four tokens at most, every operator brings three
        return numbers * log2(self.modulus) + numbers - 1

    def generate(self, draws: Draws, rows: int, length: int) -> Batch:
        inputs = np.empty(rows * length, dtype=np.int64)
        targets = ignored(rows, length)
        targets[:, -1] = self._write(draws, inputs, np.arange(rows) * length, np.full(rows, length))
        return Batch(inputs.reshape(rows, length), targets)

    def _write(self, draws: Draws, tokens: IntArray, start: IntArray, length: IntArray) -> IntArray:
        """Write an expression of each ``length`` into ``tokens`` from each ``start``; their values.

        One level of all expressions at a time: first their brackets and operators, going down; then the values, going
        up.
        """
        levels = []
        while start.size:
            long = length >= 5
            begin, extent = start[long], length[long]
            left = 1 + draws.integers(extent - 4, len(extent))
            operator = draws.integers(3 if self.products else 2, len(extent))
            tokens[begin] = self.modulus + OPEN
            tokens[begin + left + 1] = self.modulus + operator
            tokens[begin + extent - 1] = self.modulus + CLOSE
            number = self._write_numbers(draws, tokens, start[~long], length[~long])
            levels.append((long, operator, number))
            start = np.concatenate([begin + 1, begin + left + 2])
            length = np.concatenate([left, extent - left - 3])
        values = np.empty(0, dtype=np.int64)
        for long, operator, number in reversed(levels):
            left, right = np.split(values, 2)
            values = np.empty(len(long), dtype=np.int64)
            values[long] = np.choose(operator, [left + right, left - right, left * right]) % self.modulus
            values[~long] = number
        return values

    def _write_numbers(self, draws: Draws, tokens: IntArray, start: IntArray, length: IntArray) -> IntArray:
        """Write d, -d, (d) or (-d), by ``length``; their values."""
        digit = draws.integers(self.modulus, len(start))
        in_brackets = length >= 3
        negative = length % 2 == 0
        tokens[start[in_brackets]] = self.modulus + OPEN
        tokens[(start + length - 1)[in_brackets]] = self.modulus + CLOSE
        tokens[(start + in_brackets)[negative]] = self.modulus + MINUS
        tokens[start + in_brackets + negative] = digit
        return np.where(negative, -digit, digit) % self.modulus
