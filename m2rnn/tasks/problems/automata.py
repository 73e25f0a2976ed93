"""Regular languages of Delétang et al.: parity, even pairs and cycle navigation.

Protocol: "Neural Networks and the Chomsky Hierarchy" (arXiv 2207.02098, repository
google-deepmind/neural_networks_chomsky_hierarchy). Letters are drawn uniformly; the answer is the state after the last
letter. Models train on lengths drawn from 1 to 40 and are tested up to 500. Grazzi et al. (arXiv 2411.12537) and
Mamba-3's paper use the same tasks.

``answers="last"`` is that protocol. ``"all"`` asks for the state after every letter, which is easier to learn from.
"""

from abc import abstractmethod
from dataclasses import dataclass
from math import log2
from typing import ClassVar, Literal

from m2rnn.tasks.problems.contract import Batch, IntArray
from m2rnn.tasks.problems.generate import Draws, ExactProblem, check_at_least, check_one_of, ignored

CHOMSKY = "Delétang et al., arXiv 2207.02098; google-deepmind/neural_networks_chomsky_hierarchy"

Answers = Literal["last", "all"]


@dataclass(frozen=True)
class _Automaton(ExactProblem):
    """Uniform letters, and the states that follow them."""

    answers: Answers = "last"

    source: ClassVar[str] = CHOMSKY
    train_lengths: ClassVar[tuple[int, int]] = (1, 40)
    test_lengths: ClassVar[tuple[int, ...]] = (40, 80, 160, 320, 500)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("last", "all", answers=self.answers)

    @property
    @abstractmethod
    def letters(self) -> int:
        """The number of letters."""

    @abstractmethod
    def states(self, letters: IntArray) -> IntArray:
        """The state after each of ``letters`` [N, T]."""

    def entropy(self, length: int) -> float:
        return length * log2(self.letters)

    def generate(self, draws: Draws, rows: int, length: int) -> Batch:
        letters = draws.integers(self.letters, rows, length)
        return Batch(letters, only_last(self.states(letters)) if self.answers == "last" else self.states(letters))


@dataclass(frozen=True)
class Parity(_Automaton):
    """Whether the number of ones so far is odd (1) or even (0)."""

    name: ClassVar[str] = "parity"

    @property
    def vocab_size(self) -> int:
        return 2

    @property
    def letters(self) -> int:
        return 2

    def states(self, letters: IntArray) -> IntArray:
        return letters.cumsum(axis=1) % 2


@dataclass(frozen=True)
class EvenPairs(_Automaton):
    """Whether the number of unequal neighbours, 01 or 10, is odd (1) or even (0).

    That is whether the last bit differs from the first.
    """

    name: ClassVar[str] = "even_pairs"

    @property
    def vocab_size(self) -> int:
        return 2

    @property
    def letters(self) -> int:
        return 2

    def states(self, letters: IntArray) -> IntArray:
        return letters ^ letters[:, :1]


@dataclass(frozen=True)
class CycleNavigation(_Automaton):
    """The position on a circle after steps of -1, 0 and +1.

    The circle has ``places``; the steps are the letters 0, 1 and 2.
    """

    places: int = 5

    name: ClassVar[str] = "cycle_navigation"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(2, places=self.places)

    @property
    def vocab_size(self) -> int:
        return max(3, self.places)

    @property
    def letters(self) -> int:
        return 3

    def states(self, letters: IntArray) -> IntArray:
        return (letters - 1).cumsum(axis=1) % self.places


def only_last(answers: IntArray) -> IntArray:
    """``answers`` [N, T], of which only those of the last position count."""
    targets = ignored(*answers.shape)
    targets[:, -1:] = answers[:, -1:]
    return targets
