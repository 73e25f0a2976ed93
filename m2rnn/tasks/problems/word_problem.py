"""Word problems over finite groups: given x_1 … x_T, say what x_1 · x_2 · … · x_t is, for every t.

The running product is state tracking at its smallest: each token changes a state that has to be known exactly
at every later token. Over S5 and A5 the problem is complete for NC¹, which no Transformer and no linear
diagonal recurrence of fixed depth is believed to solve at every length. S3 is the smallest group that is not
commutative.

Elements are numbered 0 … order - 1, and element 0 is the identity:
    S3 S4 S5    all permutations of 3, 4, 5 points, in lexicographic order
    A4 A5       the even ones, in lexicographic order
    Zn          the integers modulo n, any n from 2 on ("Z60")
    parity      Z2: the running parity of bits
    S3xZ2       a direct product of any of these: the pair (a, b) is the number a · (order of the second) + b

Order of composition: a · b means "first a, then b". As permutations of points, (a · b)(i) = b(a(i)).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import permutations
from typing import ClassVar, Literal

import numpy as np

from m2rnn.tasks.problems.contract import Batch, IntArray, Problem, Score, Split
from m2rnn.tasks.problems.generate import SPLIT_NUMBER, in_split

__all__ = ["Batch", "Group", "Inputs", "Score", "Split", "WordProblem", "check_group_axioms", "in_split"]

Inputs = Literal["all", "generators"]

MAX_ORDER = 2048  # the table has order² entries


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group as its multiplication table: ``table[a, b]`` is a · b, and element 0 is the identity.

    The table is checked against the group axioms on construction; ``ValueError`` says which one it breaks.
    """

    name: str
    table: IntArray
    generators: tuple[int, ...]

    def __post_init__(self) -> None:
        check_group_axioms(self.table, self.generators)
        self.table.setflags(write=False)

    @property
    def order(self) -> int:
        return len(self.table)

    @staticmethod
    def from_name(name: str) -> "Group":
        """The group of that name, such as "A5", "Z60" or "S3xZ2"; ``ValueError`` for other names."""
        return reduce(_direct_product, [_simple_group(factor, name) for factor in name.split("x")])

    def running_products(self, inputs: IntArray) -> IntArray:
        """Targets of ``inputs`` [N, T]: entry [n, t] is inputs[n, 0] · … · inputs[n, t]."""
        products = np.empty_like(inputs)
        product = np.zeros(len(inputs), dtype=np.int64)
        for t in range(inputs.shape[1]):
            product = self.table[product, inputs[:, t]]
            products[:, t] = product
        return products


def _simple_group(factor: str, name: str) -> Group:
    if factor == "parity":
        return _cyclic("parity", 2)
    if match := re.fullmatch(r"([SA])([3-5])|Z([1-9]\d{0,8})", factor):
        kind, points, modulus = match.groups()
        if modulus is not None and 2 <= int(modulus) <= MAX_ORDER:
            return _cyclic(factor, int(modulus))
        if kind is not None:
            return _permutation_group(factor, int(points), even_only=kind == "A")
    raise ValueError(
        f"group {name!r}: unknown group {factor!r}; expected S3, S4, S5, A3, A4, A5, parity, "
        f"Zn with n from 2 to {MAX_ORDER}, or a direct product of these such as S3xZ2"
    )


def _cyclic(name: str, n: int) -> Group:
    numbers = np.arange(n)
    return Group(name, (numbers[:, None] + numbers) % n, generators=(1,))


def _permutation_group(name: str, points: int, even_only: bool) -> Group:
    elements = [p for p in permutations(range(points)) if not even_only or _is_even(p)]
    number = {p: i for i, p in enumerate(elements)}
    table = np.array([[number[tuple(b[i] for i in a)] for b in elements] for a in elements])
    identity = tuple(range(points))
    if even_only:  # the 3-cycles (0 1 k)
        generators = [(1, k, *(0 if i == k else i for i in range(2, points))) for k in range(2, points)]
    else:  # a transposition and the cycle of all points
        generators = [(1, 0, *identity[2:]), (*identity[1:], 0)]
    return Group(name, table, tuple(number[g] for g in generators))


def _is_even(permutation: tuple[int, ...]) -> bool:
    inversions = sum(a > b for i, a in enumerate(permutation) for b in permutation[i:])
    return inversions % 2 == 0


def _direct_product(a: Group, b: Group) -> Group:
    order = a.order * b.order
    if order > MAX_ORDER:
        raise ValueError(f"group {a.name}x{b.name} has {order} elements; expected at most {MAX_ORDER}")
    table = a.table[:, None, :, None] * b.order + b.table[None, :, None, :]
    generators = (*(g * b.order for g in a.generators), *b.generators)
    return Group(f"{a.name}x{b.name}", table.reshape(order, order), generators)


def check_group_axioms(table: IntArray, generators: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``table`` is a group with identity 0 that ``generators`` generate.

    Associativity is checked exactly, by Light's test: (a · g) · b = a · (g · b) for all a, b and every
    generator g implies it for all triples.
    """
    numbers = np.arange(len(table))
    if table.shape != (len(numbers), len(numbers)) or not np.isin(table, numbers).all():
        raise ValueError("not closed: every entry must be the number of an element, in a square table")
    if not ((table[0] == numbers).all() and (table[:, 0] == numbers).all()):
        raise ValueError("element 0 is not the identity")
    if not ((table == 0).any(axis=1).all() and (table == 0).any(axis=0).all()):
        raise ValueError("an element has no inverse")
    for g in generators:
        if not (table[table[:, g]] == table[:, table[g]]).all():
            raise ValueError(f"not associative at element {g}")
    reached = np.zeros(len(numbers), dtype=bool)
    frontier = np.array([0])
    while frontier.size:
        reached[frontier] = True
        frontier = np.unique(table[frontier[:, None], generators])
        frontier = frontier[~reached[frontier]]
    if not reached.all():
        raise ValueError(f"elements {generators} do not generate the group")


@dataclass(frozen=True)
class WordProblem:
    """Random sequences over a group, with their running products: a `Problem` with an answer at every position.

    ``inputs="all"`` draws each token from all elements; ``"generators"`` from the identity and a generating
    set (with the identity, because otherwise a cyclic group would have one sequence of each length). Tokens
    are the numbers of the elements in both cases.

    Every batch is a function of (seed, split, index, batch_size, length, inputs) alone, on every machine and version
    of numpy: there is no generator whose state would have to be saved.

    A hash of its tokens assigns a sequence to train (3/4 of them), validation (1/8) or test (1/8), whatever
    the seed, so the splits never share a sequence. Where fewer than 256 different sequences of a length
    exist, a split could be empty, so all splits draw from all of them: `splits_are_disjoint` tells, also for batches of
    the first few elements alone. A short sequence can be the beginning of a longer one in another split.
    """

    group: Group
    inputs: Inputs = "all"
    seed: int = 0

    source: ClassVar[str] = "Liu et al., arXiv 2210.10749; Merrill et al., arXiv 2404.08819"
    train_lengths: ClassVar[tuple[int, int]] = (128, 128)
    test_lengths: ClassVar[tuple[int, ...]] = (128, 256, 512, 1024, 4096)
    min_length: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.inputs not in ("all", "generators"):
            raise ValueError(f"inputs {self.inputs!r}: expected 'all' or 'generators'")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: expected an integer from 0 to 2**63 - 1")

    @property
    def name(self) -> str:
        return self.group.name

    @property
    def vocab_size(self) -> int:
        return self.group.order

    def variants(self) -> Mapping[str, Problem]:
        """None: there is one distribution."""
        return {}

    @cached_property
    def alphabet(self) -> IntArray:
        """The elements that occur as inputs, in increasing order."""
        if self.inputs == "all":
            return np.arange(self.group.order)
        return self.generators

    @cached_property
    def generators(self) -> IntArray:
        """The identity and the generating set, in increasing order."""
        return np.unique([0, *self.group.generators])

    @cached_property
    def by_word_length(self) -> IntArray:
        """The elements of the alphabet: those that are products of fewer generators first."""
        reached = dict.fromkeys(self.generators.tolist())
        frontier = list(reached)
        while frontier:
            products = np.unique(self.group.table[np.ix_(frontier, self.generators)]).tolist()
            frontier = [element for element in products if element not in reached]
            reached.update(dict.fromkeys(frontier))
        return np.array([element for element in reached if element in self.alphabet])

    def splits_are_disjoint(self, length: int, inputs: int | None = None) -> bool:
        """Whether train, validation and test have no sequence of this length in common."""
        sequences: int = (len(self.alphabet) if inputs is None else inputs) ** length
        return sequences >= 256

    def batch(self, split: Split, index: int, batch_size: int, length: int, inputs: int | None = None) -> Batch:
        """Batch number ``index`` of a split: ``batch_size`` sequences of ``length`` tokens, all of them among the first
        ``inputs`` elements `by_word_length` if that is given and not all."""
        letters = self.alphabet
        if inputs is not None and inputs < len(letters):
            letters = self.by_word_length[:inputs]
        kept: list[IntArray] = []
        missing, attempt = batch_size, 0
        while missing > 0:
            candidates = letters[self._draw(split, index, attempt, batch_size, length, len(letters))]
            if self.splits_are_disjoint(length, len(letters)):
                candidates = candidates[in_split(candidates, split)]
            kept.append(candidates[:missing])
            missing -= len(kept[-1])
            attempt += 1
        tokens = np.concatenate(kept) if kept else np.empty((0, length), dtype=np.int64)
        return Batch(tokens, self.group.running_products(tokens))

    def _draw(self, split: Split, index: int, attempt: int, rows: int, length: int, below: int) -> IntArray:
        # Raw bits, because numpy keeps them the same from version to version, but not what Generator makes of
        # them. The counter's first word counts the numbers within one draw.
        stream = np.random.Philox(counter=[0, attempt, index, length], key=[self.seed, SPLIT_NUMBER[split]])
        high_bits = stream.random_raw(rows * length).reshape(rows, length) >> np.uint64(32)
        numbers = (high_bits * np.uint64(below)) >> np.uint64(32)
        return numbers.astype(np.int64)
