"""Small machines whose programs are sequences of tokens: statements that change a state, questions that show a part.

The common part of traces, boxes and board. A machine is its tables: what every statement makes of every state. So
each task writes its rules once, in `table`, and all programs run at the same speed.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import log2
from typing import ClassVar

import numpy as np

from m2rnn.tasks.problems.contract import Batch, BoolArray, IntArray
from m2rnn.tasks.problems.generate import Draws, ExactProblem, check_probability, ignored

WORDS = 3  # tokens of a statement or question
MAX_ENTRIES = 2**26  # of a machine's tables: half a GiB

State = tuple[int, ...]
Rule = Callable[[State], State]
Statement = tuple[tuple[int, int, int], Rule]  # its words, and what it makes of a state
Question = tuple[tuple[int, int], Callable[[State], int]]  # its first two words, and the third in a state


@dataclass(frozen=True)
class Tables:
    """A machine as arrays; questions are numbered after the S statements.

    ``tokens`` [S + Q, 3] · ``outcomes`` [2, S + Q, states]: the next state, for either side of a coin that nobody sees
    · ``answers`` [Q, states]: the third token of a question · ``seen`` and ``hidden``: where each kind of statement,
    without and with a coin, starts and how many it has · ``start``: the first state.
    """

    tokens: IntArray
    outcomes: IntArray
    answers: IntArray
    seen: tuple[IntArray, IntArray]
    hidden: tuple[IntArray, IntArray]
    start: int

    @cached_property
    def flips(self) -> BoolArray:
        """Whether the outcome of each statement depends on the coin, [S + Q]."""
        return np.array((self.outcomes[0] != self.outcomes[1]).any(axis=1))


def table(
    states: Sequence[State],
    start: State,
    seen: Iterable[Iterable[Statement]],
    questions: Iterable[Question],
    hidden: Iterable[Iterable[Statement]] = (),
) -> Tables:
    """The tables of a machine from its rules: of kinds of statements (a list each), and of questions.

    Kinds without a statement are left out. A statement of a hidden kind does what its rule says, or nothing.
    """
    number = {state: i for i, state in enumerate(states)}
    tokens: list[tuple[int, int, int]] = []
    heads, tails = [], []
    groups = []
    for kinds, coin in ((seen, False), (hidden, True)):
        starts, sizes = [], []
        for kind in map(list, kinds):
            if not kind:
                continue
            starts.append(len(tokens))
            sizes.append(len(kind))
            for words, rule in kind:
                tokens.append(words)
                heads.append([number[rule(state)] for state in states])
                tails.append(list(range(len(states))) if coin else heads[-1])
        groups.append((np.array(starts, dtype=np.int64), np.array(sizes, dtype=np.int64)))
    asked = list(questions)
    tokens += [(*words, 0) for words, _ in asked]
    unchanged = [list(range(len(states)))] * len(asked)
    answers = np.array([[answer(state) for state in states] for _, answer in asked])
    outcomes = np.array([heads + unchanged, tails + unchanged])
    return Tables(np.array(tokens), outcomes, answers, groups[0], groups[1], number[start])


@dataclass(frozen=True)
class Machine(ExactProblem):
    """Programs of three-token statements, uniform in kind and then in what they name, with sparse questions.

    A statement is a question with probability ``reveals``; the last complete one always is. Its answer is the next
    token, which the target at its second token names; so the model reads what was revealed, as in language modelling.
    A sequence ends where its length does, within a statement or not.

    With hidden statements the state is only known in part. Then the questions that count are those whose answer
    follows from what has been seen, so that every accuracy below 100 % is an error.
    """

    reveals: float = 0.25

    train_lengths: ClassVar[tuple[int, int]] = (192, 192)
    test_lengths: ClassVar[tuple[int, ...]] = (192, 384, 768, 1536, 3072)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability(reveals=self.reveals)

    @property
    def min_length(self) -> int:
        return 2

    @property
    def hides(self) -> float:
        """The probability that a statement is a hidden one."""
        return 0.0

    @abstractmethod
    def build(self) -> Tables:
        """The machine."""

    @cached_property
    def tables(self) -> Tables:
        """The machine's tables."""
        return self.build()

    def entropy(self, length: int) -> float:
        questions = log2(len(self.tables.answers))
        _, sizes = self.tables.seen
        statement = log2(len(sizes)) + float(np.log2(sizes).mean())
        before_the_last = (length - 2) // WORDS
        each = (1 - self.reveals) * (1 - self.hides) * statement + self.reveals * questions
        return before_the_last * each + questions

    def generate(self, draws: Draws, rows: int, length: int) -> Batch:
        machine, count = self.tables, -(-length // WORDS)
        statements = len(machine.tokens) - len(machine.answers)
        chosen = self._draw_statements(draws, count, rows)
        asks = draws.happens(self.reveals, count, rows)
        asks[(length - 2) // WORDS] = True
        questions = draws.integers(len(machine.answers), count, rows)
        chosen[asks] = statements + questions[asks]
        coins = draws.integers(2, count, rows) if self.hides else np.zeros((count, rows), dtype=np.int64)
        inputs = machine.tokens[chosen]  # [count, rows, 3]
        known = np.empty((count, rows), dtype=bool)
        state = np.full(rows, machine.start)
        possible = np.zeros((rows, machine.outcomes.shape[2]), dtype=bool)
        possible[:, machine.start] = True
        for step in range(count):
            state = machine.outcomes[coins[step], chosen[step], state]
            row, asked = np.nonzero(asks[step])[0], questions[step, asks[step]]
            inputs[step, row, 2] = answer = machine.answers[asked, state[row]]
            if self.hides:
                possible = _reached(machine, chosen[step], possible)
                fits = machine.answers[asked] == answer[:, None]
                known[step, row] = (fits | ~possible[row]).all(axis=1)
                possible[row] &= fits
        scored = asks & known if self.hides else asks
        targets = ignored(count * rows, WORDS).reshape(count, rows, WORDS)
        targets[scored, 1] = inputs[scored, 2]
        by_row = (part.transpose(1, 0, 2).reshape(rows, count * WORDS)[:, :length] for part in (inputs, targets))
        return Batch(*by_row)

    def _draw_statements(self, draws: Draws, *shape: int) -> IntArray:
        """Numbers of statements: hidden or not, then a kind, then one of it."""
        starts, sizes = self.tables.seen
        kind = draws.integers(len(starts), *shape)
        chosen = starts[kind] + draws.integers(sizes[kind], *shape)
        if self.hides:
            starts, sizes = self.tables.hidden
            kind = draws.integers(len(starts), *shape)
            hidden = starts[kind] + draws.integers(sizes[kind], *shape)
            chosen = np.where(draws.happens(self.hides, *shape), hidden, chosen)
        return chosen


def _reached(machine: Tables, chosen: IntArray, possible: BoolArray) -> BoolArray:
    """The states that ``possible`` [N, states] ones may lead to, whichever way the coin fell."""
    states = possible.shape[1]
    reached = np.zeros(possible.size, dtype=bool)
    row, state = np.divmod(np.flatnonzero(possible), states)
    statement = chosen[row]
    reached[row * states + machine.outcomes[0, statement, state]] = True
    unsure = machine.flips[statement]
    row, statement, state = row[unsure], statement[unsure], state[unsure]
    reached[row * states + machine.outcomes[1, statement, state]] = True
    return reached.reshape(possible.shape)


def all_states(values: int, places: int) -> list[State]:
    """Every way to give each of ``places`` one of ``values``."""
    return list(product(range(values), repeat=places))


def check_size(states: int, statements: int, options: str) -> None:
    """Raise ``ValueError`` if a machine's tables would not fit in memory."""
    if 2 * states * statements > MAX_ENTRIES:
        raise ValueError(f"{options}: {states} states and {statements} statements are too many; choose smaller numbers")
