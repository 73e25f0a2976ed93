"""Phonebook: a list of names with their numbers, and the number of one of them.

Task: Jelassi et al., "Repeat After Me" (arXiv 2402.01032), who ask pretrained language models in English. Here names
are two tokens, a first name and a surname, and numbers have four digits; no two entries have the same name, while many
share one half of it, so that neither half is enough.
"""

from dataclasses import dataclass
from math import log2
from typing import ClassVar

import numpy as np

from m2rnn.tasks.problems.contract import Batch
from m2rnn.tasks.problems.generate import Draws, ExactProblem, check_at_least, ignored

DIGITS, NUMBER = 10, 4
ENTRY = 2 + NUMBER  # tokens


@dataclass(frozen=True)
class Phonebook(ExactProblem):
    """Give the number of one name of a list.

    As many entries as fit, a question mark, a name of the book, and its number, digit by digit. The digits are due from
    the surname on, where each is the next token. In front are blanks, if any.

    Tokens: ten digits; ``names`` first names and as many surnames; the question mark; the blank.
    """

    names: int = 32

    name: ClassVar[str] = "phonebook"
    source: ClassVar[str] = "Jelassi et al., arXiv 2402.01032; with tokens instead of English"
    train_lengths: ClassVar[tuple[int, int]] = (128, 128)
    test_lengths: ClassVar[tuple[int, ...]] = (128, 256, 512, 1024, 2048)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, names=self.names)

    @property
    def min_length(self) -> int:
        return 2 * ENTRY

    @property
    def vocab_size(self) -> int:
        return DIGITS + 2 * self.names + 2

    def _entries(self, length: int) -> int:
        return min(length // ENTRY - 1, self.names**2)

    def entropy(self, length: int) -> float:
        return self._entries(length) * NUMBER * log2(DIGITS)

    def generate(self, draws: Draws, rows: int, length: int) -> Batch:
        entries = self._entries(length)
        question, blank = self.vocab_size - 2, self.vocab_size - 1
        first, surname = np.divmod(draws.distinct(self.names**2, rows, entries), self.names)
        book = np.empty((rows, entries, ENTRY), dtype=np.int64)
        book[:, :, 0], book[:, :, 1] = DIGITS + first, DIGITS + self.names + surname
        book[:, :, 2:] = draws.integers(DIGITS, rows, entries, NUMBER)
        asked = book[np.arange(rows), draws.integers(entries, rows)]
        inputs, targets = np.full((rows, length), blank, dtype=np.int64), ignored(rows, length)
        inputs[:, -ENTRY * (entries + 1) : -ENTRY] = book.reshape(rows, entries * ENTRY)
        inputs[:, -ENTRY], inputs[:, -ENTRY + 1 :] = question, asked[:, :-1]
        targets[:, -NUMBER:] = asked[:, -NUMBER:]
        return Batch(inputs, targets)
