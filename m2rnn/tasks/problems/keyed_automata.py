"""Keyed automata: several copies of one automaton, and every letter is for the copy that a key names.

A task of this project. Word problems have one state; associative recall has many values that never change. Here
many states change, and a model has to find the right one and advance it: what a program does with its variables.
"""

from dataclasses import dataclass
from functools import cached_property
from math import log2
from typing import ClassVar

import numpy as np

from m2rnn.tasks.problems.contract import Batch, IntArray
from m2rnn.tasks.problems.generate import Draws, ExactProblem, check_at_least, ignored


@dataclass(frozen=True)
class KeyedAutomata(ExactProblem):
    """Advance the automaton that a key names, and name its new state.

    Keys and letters alternate; the state is due at each letter.

    Every automaton has the same transitions and starts in state 0. Even letters permute the ``states``; odd letters map
    each state to any, so some states merge. ``machine`` draws other transitions.

    States and letters share the first tokens; key i is token max(states, letters) + i.
    """

    keys: int = 4
    states: int = 5
    letters: int = 4
    machine: int = 0

    name: ClassVar[str] = "keyed_automata"
    source: ClassVar[str] = "this project"
    train_lengths: ClassVar[tuple[int, int]] = (128, 128)
    test_lengths: ClassVar[tuple[int, ...]] = (128, 256, 512, 1024, 2048)
    min_length: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, keys=self.keys, states=self.states, letters=self.letters)
        check_at_least(0, machine=self.machine)

    @property
    def vocab_size(self) -> int:
        return self._first_key + self.keys

    @property
    def _first_key(self) -> int:
        return max(self.states, self.letters)

    @cached_property
    def transitions(self) -> IntArray:
        """``[states, letters]``: the state that each letter leads to."""
        draws = Draws((self.machine, 2**63), (0, self.states, self.letters))
        permutations = draws.orders(self.letters, self.states)
        maps = draws.integers(self.states, self.letters, self.states)
        maps[0::2] = permutations[0::2]
        return maps.T

    def entropy(self, length: int) -> float:
        return length // 2 * (log2(self.letters) + log2(self.keys))

    def generate(self, draws: Draws, rows: int, length: int) -> Batch:
        keys = draws.integers(self.keys, (length + 1) // 2, rows)
        letters = draws.integers(self.letters, length // 2, rows)
        inputs, targets = np.empty((rows, length), dtype=np.int64), ignored(rows, length)
        inputs[:, 0::2], inputs[:, 1::2] = self._first_key + keys.T, letters.T
        each, states = np.arange(rows), np.zeros((rows, self.keys), dtype=np.int64)
        for step, (key, letter) in enumerate(zip(keys, letters, strict=False)):
            state = self.transitions[states[each, key], letter]
            states[each, key] = targets[:, 2 * step + 1] = state
        return Batch(inputs, targets)
