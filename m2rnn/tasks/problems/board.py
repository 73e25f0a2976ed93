"""Pieces moved on a small board: on which square is each now?

After Toshniwal et al., "Chess as a testbed for language model state tracking" (arXiv 2102.13249), on a board that is
small enough to have exact tables, with this project's rules.

    tokens     0 … squares - 1      squares, row by row
               then the pieces; piece i starts on square i
               then the directions  up, down, left, right
               then the operations, each followed by two words:

               step p d     piece p goes one square in direction d, unless the border or another piece is in the way
               place p s    piece p goes to square s, unless another piece is there
               where p s    s is the square of piece p: to be predicted
"""

from dataclasses import dataclass
from operator import itemgetter
from typing import ClassVar

from m2rnn.tasks.problems.generate import check_at_least
from m2rnn.tasks.problems.machine import Machine, Rule, State, Tables, all_states, check_size, table

DIRECTIONS = ((-1, 0), (1, 0), (0, -1), (0, 1))
STEP, PLACE, WHERE = range(3)  # beyond the directions


@dataclass(frozen=True)
class Board(Machine):
    """Predict the square of every piece that is asked for, on a small board."""

    pieces: int = 3
    height: int = 3
    width: int = 3

    name: ClassVar[str] = "board"
    source: ClassVar[str] = "after Toshniwal et al., arXiv 2102.13249, with this project's rules"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, pieces=self.pieces, height=self.height, width=self.width)
        if self.pieces > self._squares:
            raise ValueError(f"pieces {self.pieces}: expected at most one for each of the {self._squares} squares")
        options = f"pieces {self.pieces}, height {self.height}, width {self.width}"
        check_size(self._squares**self.pieces, self.pieces * (self._squares + 5), options)

    @property
    def _squares(self) -> int:
        return self.height * self.width

    @property
    def vocab_size(self) -> int:
        return self._squares + self.pieces + 7

    def build(self) -> Tables:
        pieces, squares = range(self.pieces), range(self._squares)
        first_piece, first_direction = self._squares, self._squares + self.pieces
        code = first_direction + len(DIRECTIONS)

        def go(state: State, piece: int, square: int) -> State:
            return state if square in state else (*state[:piece], square, *state[piece + 1 :])

        def step(piece: int, down: int, right: int) -> Rule:
            def rule(state: State) -> State:
                row, column = divmod(state[piece], self.width)
                row, column = row + down, column + right
                inside = 0 <= row < self.height and 0 <= column < self.width
                return go(state, piece, row * self.width + column) if inside else state

            return rule

        def place(piece: int, square: int) -> Rule:
            return lambda state: go(state, piece, square)

        seen = [
            [
                ((code + STEP, first_piece + p, first_direction + d), step(p, *direction))
                for p in pieces
                for d, direction in enumerate(DIRECTIONS)
            ],
            [((code + PLACE, first_piece + p, s), place(p, s)) for p in pieces for s in squares],
        ]
        questions = [((code + WHERE, first_piece + p), itemgetter(p)) for p in pieces]
        states = [state for state in all_states(self._squares, self.pieces) if len(set(state)) == self.pieces]
        return table(states, tuple(pieces), seen, questions)
