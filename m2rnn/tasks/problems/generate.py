"""Random batches that are functions of their number alone, and splits that share no sequence."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from m2rnn.tasks.problems.contract import IGNORED, Batch, BoolArray, IntArray, Problem, Split

HashArray = NDArray[np.uint64]

TOKENS_PER_DRAW = 2**20  # at most, so that a test batch, of whose candidates one in eight is kept, fits in memory
ENOUGH_BITS = 8  # of sequences: with fewer than 256, a split could be empty

SPLIT_NUMBER: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}
_EIGHTHS: dict[Split, tuple[int, ...]] = {"train": (0, 1, 2, 3, 4, 5), "validation": (6,), "test": (7,)}


class Draws:
    """Random numbers in a fixed order, determined by ``key`` (two words) and ``counter`` (three) on every machine.

    They are made from Philox's raw bits, which numpy keeps the same from version to version, but not what its Generator
    makes of them.
    """

    def __init__(self, key: tuple[int, int], counter: tuple[int, int, int]) -> None:
        self._stream = np.random.Philox(counter=[0, *counter], key=list(key))

    def bits(self, *shape: int) -> HashArray:
        """64 random bits each."""
        return self._stream.random_raw(int(np.prod(shape))).reshape(shape)

    def integers(self, below: int | IntArray, *shape: int) -> IntArray:
        """Integers from 0 to ``below`` - 1, of a ``shape`` to which ``below`` broadcasts; uniform to 2^-32."""
        high_bits = self.bits(*shape) >> np.uint64(32)
        return ((high_bits * np.asarray(below).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)

    def happens(self, probability: float, *shape: int) -> BoolArray:
        """True with ``probability``."""
        return (self.bits(*shape) >> np.uint64(11)) < np.uint64(round(probability * 2**53))

    def orders(self, rows: int, count: int) -> IntArray:
        """A random order of 0 … count - 1 in each row."""
        return np.argsort(self.bits(rows, count), axis=1, kind="stable").astype(np.int64)

    def distinct(self, below: int, rows: int, count: int) -> IntArray:
        """``count`` different integers from 0 to ``below`` - 1 in each row, in random order."""
        if count > below:
            raise ValueError(f"{count} different tokens of {below}: expected at most {below}")
        if 4 * count > below:
            return self.orders(rows, below)[:, :count]
        # Repeated numbers are drawn again. No step prefers a number, so every choice in every order is as likely.
        numbers = self.integers(below, rows, count)
        while True:
            order = np.argsort(numbers, axis=1, kind="stable")
            ordered = np.take_along_axis(numbers, order, axis=1)
            row, place = np.nonzero(ordered[:, 1:] == ordered[:, :-1])
            if not len(row):
                return numbers
            numbers[row, order[row, place + 1]] = self.integers(below, len(row))


@dataclass(frozen=True, kw_only=True)
class ExactProblem(ABC):
    """A problem of which only `generate`, `entropy`, the vocabulary, lengths and names remain to be written.

    Every batch is a function of (options, seed, split, index, batch_size, length) alone, on every machine and version
    of numpy. A hash of its inputs assigns a sequence to train (3/4 of them), validation (1/8) or test (1/8), whatever
    the seed, so the splits never share a sequence. Where fewer than about 256 sequences of a length exist, all splits
    draw from all of them: `splits_are_disjoint` tells.
    """

    seed: int = 0

    source: ClassVar[str]
    train_lengths: ClassVar[tuple[int, int]]
    test_lengths: ClassVar[tuple[int, ...]]

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: expected an integer from 0 to 2**63 - 1")

    @property
    @abstractmethod
    def name(self) -> str:
        """Short and unique."""

    @property
    def min_length(self) -> int:
        """The shortest sequence."""
        return 1

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of tokens, of inputs and targets together."""

    @abstractmethod
    def entropy(self, length: int) -> float:
        """A lower bound of the bits of randomness in a sequence of this length; exact only where they are few."""

    @abstractmethod
    def generate(self, draws: Draws, rows: int, length: int) -> Batch:
        """``rows`` random sequences of ``length`` tokens, whatever split they belong to."""

    def splits_are_disjoint(self, length: int) -> bool:
        """Whether train, validation and test have no sequence of this length in common."""
        return self.entropy(length) >= ENOUGH_BITS

    def variants(self) -> Mapping[str, Problem]:
        """Other distributions to test a trained model on: none by default."""
        return {}

    def batch(self, split: Split, index: int, batch_size: int, length: int) -> Batch:
        """Batch number ``index`` of a split: ``batch_size`` sequences of ``length`` tokens."""
        if split not in SPLIT_NUMBER:
            raise ValueError(f"split {split!r}: expected train, validation or test")
        if length < self.min_length:
            raise ValueError(f"length {length}: {self.name} needs at least {self.min_length} tokens")
        disjoint = self.splits_are_disjoint(length)
        kept: list[Batch] = []
        missing, attempt = batch_size, 0
        while missing > 0 or not kept:
            draws = Draws((self.seed, SPLIT_NUMBER[split]), (attempt, index, length))
            rows = missing * 8 // len(_EIGHTHS[split]) + 8 if disjoint else missing
            batch = self.generate(draws, min(rows, max(TOKENS_PER_DRAW // length, 1)), length)
            if disjoint:
                inside = in_split(batch.inputs, split)
                batch = Batch(batch.inputs[inside], batch.targets[inside])
            kept.append(Batch(batch.inputs[:missing], batch.targets[:missing]))
            missing -= len(kept[-1].inputs)
            attempt += 1
        if len(kept) == 1:
            return kept[0]
        return Batch(*(np.concatenate(parts) for parts in zip(*kept, strict=True)))


def ignored(rows: int, length: int) -> IntArray:
    """Targets [rows, length] of which none counts yet."""
    return np.full((rows, length), IGNORED, dtype=np.int64)


def check_at_least(least: int, **options: int) -> None:
    """Raise ``ValueError`` for an option, given by its name, that is below ``least``."""
    for name, value in options.items():
        if value < least:
            raise ValueError(f"{name} {value}: expected a whole number of at least {least}")


def check_probability(**options: float) -> None:
    """Raise ``ValueError`` for an option, given by its name, that is no probability."""
    for name, value in options.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} {value}: expected a probability from 0 to 1")


def check_one_of(*choices: str, **options: str) -> None:
    """Raise ``ValueError`` for an option, given by its name, that is none of ``choices``."""
    for name, value in options.items():
        if value not in choices:
            raise ValueError(f"{name} {value!r}: expected {' or '.join(map(repr, choices))}")


def in_split(sequences: IntArray, split: Split) -> BoolArray:
    """For each row of ``sequences`` [N, T], whether it belongs to ``split``."""
    eighth = _hash_rows(sequences) >> np.uint64(61)
    return np.isin(eighth, np.array(_EIGHTHS[split], dtype=np.uint64))


def _hash_rows(sequences: IntArray) -> HashArray:
    """64 well-mixed bits of every row's tokens, their positions and their number."""
    positions = np.arange(1, sequences.shape[1] + 1, dtype=np.uint64) << np.uint64(32)
    words = _mix_bits(sequences.astype(np.uint64) | positions)
    return _mix_bits(words.sum(axis=1, dtype=np.uint64))


def _mix_bits(x: HashArray) -> HashArray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), a bijection of 64-bit words."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
