"""What a synthetic problem is: batches of tokens with exact answers, a score by position, and a file of one's own.

A problem is anything with the attributes of `Problem`; nothing has to be inherited or registered. The shipped ones
derive from `m2rnn.tasks.problems.generate.ExactProblem`, which leaves one method to write.
"""

import importlib.util
import sys
import traceback
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

IGNORED = -100  # a target that does not count: what torch.nn.functional.cross_entropy ignores by default


class Batch(NamedTuple):
    """``inputs`` [N, T] and ``targets`` [N, T]: the token that the logits at the same position have to name.

    Targets of `IGNORED` count neither in the loss nor in the score.
    """

    inputs: IntArray
    targets: IntArray

    @property
    def mask(self) -> BoolArray:
        """Whether a position counts, [N, T]."""
        mask: BoolArray = self.targets != IGNORED
        return mask


@runtime_checkable
class Problem(Protocol):
    """A synthetic problem.

    Attributes:
        name: short and unique, as in a file name.
        source: the paper or repository whose protocol it follows.
        vocab_size: inputs and targets are tokens 0 … vocab_size - 1. A model has this many embeddings and logits.
        train_lengths: shortest and longest sequence to train on. Where they differ, every batch has a length drawn from
            the range.
        test_lengths: increasing lengths to test at.
        min_length: `batch` takes every length from here on.
    """

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def train_lengths(self) -> tuple[int, int]: ...
    @property
    def test_lengths(self) -> tuple[int, ...]: ...
    @property
    def min_length(self) -> int: ...

    def batch(self, split: Split, index: int, batch_size: int, length: int) -> Batch:
        """Batch number ``index`` of a split, [batch_size, length]: always the same for the same arguments.

        Train, validation and test share no sequence of a length for which `splits_are_disjoint` is true.
        """
        ...

    def splits_are_disjoint(self, length: int) -> bool:
        """Whether train, validation and test have no sequence of this length in common."""
        ...

    def variants(self) -> Mapping[str, "Problem"]:
        """Other distributions to test a trained model on, by name: of the same tokens; often none."""
        ...


class Score:
    """Accuracy by position, added up batch by batch. Targets of `IGNORED` do not count."""

    def __init__(self, length: int) -> None:
        self.sequences = 0
        self.sequences_right = 0  # those without a single error
        self._correct = np.zeros(length, dtype=np.int64)
        self._counted = np.zeros(length, dtype=np.int64)

    def add(self, predictions: IntArray, targets: IntArray) -> None:
        """Count the right ``predictions`` [N, T]."""
        if predictions.shape != targets.shape or targets.shape[1:] != self._correct.shape:
            raise ValueError(
                f"predictions {predictions.shape} and targets {targets.shape}: "
                f"expected both to be (sequences, {len(self._correct)})"
            )
        counted = targets != IGNORED
        correct = (predictions == targets) & counted
        self.sequences += len(targets)
        self.sequences_right += int((correct == counted).all(axis=1).sum())
        self._correct += correct.sum(axis=0)
        self._counted += counted.sum(axis=0)

    @property
    def answers(self) -> int:
        """How many positions of all sequences have counted."""
        return int(self._counted.sum())

    @property
    def errors(self) -> int:
        """How many of the `answers` were wrong."""
        return int((self._counted - self._correct).sum())

    def by_position(self) -> NDArray[np.float64]:
        """The share of right answers at each position, [T]; NaN where no sequence has one."""
        with np.errstate(invalid="ignore"):
            return self._correct / self._counted

    def accuracy(self, start: int = 0, stop: int | None = None) -> float:
        """The share of right answers at positions start … stop - 1; at all positions by default. NaN without any."""
        counted = int(self._counted[start:stop].sum())
        return int(self._correct[start:stop].sum()) / counted if counted else float("nan")

    def last_quarter(self) -> float:
        """Accuracy over the last quarter of the positions (rounded up), after errors had time to add up."""
        length = len(self._correct)
        return self.accuracy(start=length - -(-length // 4))

    def in_buckets(self, count: int = 32) -> list[tuple[int, int, float]]:
        """(start, stop, accuracy) of at most ``count`` ranges of positions of nearly equal size."""
        length = len(self._correct)
        edges = np.linspace(0, length, min(count, length) + 1).round().astype(int).tolist()
        return [(start, stop, self.accuracy(start, stop)) for start, stop in pairwise(edges)]


def check_problem(problem: Problem) -> None:
    """Raise ``ValueError`` unless ``problem`` keeps the contract, as far as small batches of it show."""
    expected = [name for name in dir(Problem) if not name.startswith("_")]
    missing = [name for name in expected if not hasattr(problem, name)]
    if missing:
        raise ValueError(
            f"{type(problem).__name__} has no {', '.join(missing)}: a problem needs {', '.join(expected)} "
            "(see m2rnn.tasks.problems.Problem)"
        )
    shortest, longest = problem.train_lengths
    if not problem.min_length <= shortest <= longest:
        raise ValueError(
            f"train_lengths {problem.train_lengths}: expected (shortest, longest), both at least "
            f"min_length {problem.min_length}"
        )
    lengths = problem.test_lengths
    if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < problem.min_length:
        raise ValueError(f"test_lengths {lengths}: expected increasing lengths from min_length {problem.min_length} on")
    for split in SPLITS:
        _check_batch(problem, split, length=longest)
    if problem.splits_are_disjoint(longest):
        rows = {split: {row.tobytes() for row in problem.batch(split, 0, 64, longest).inputs} for split in SPLITS}
        if rows["train"] & rows["test"] or rows["train"] & rows["validation"] or rows["validation"] & rows["test"]:
            raise ValueError(
                f"splits share sequences of length {longest}: draw each split's own, or let splits_are_disjoint say so"
            )


def _check_batch(problem: Problem, split: Split, length: int) -> None:
    batch = problem.batch(split, 3, 4, length)
    for name, tokens in zip(("inputs", "targets"), batch, strict=True):
        if not isinstance(tokens, np.ndarray) or tokens.dtype != np.int64 or tokens.shape != (4, length):
            found = f"{tokens.dtype} {tokens.shape}" if isinstance(tokens, np.ndarray) else type(tokens).__name__
            raise ValueError(f"{name} of a batch of 4 of length {length} are {found}: expected int64 (4, {length})")
        counting = tokens if name == "inputs" else tokens[tokens != IGNORED]
        if counting.size and not 0 <= counting.min() <= counting.max() < problem.vocab_size:
            raise ValueError(
                f"{name} go from {counting.min()} to {counting.max()}: expected tokens from 0 to vocab_size - 1 = "
                f"{problem.vocab_size - 1}{'' if name == 'inputs' else f', or {IGNORED} where nothing counts'}"
            )
    if not (batch.targets != IGNORED).any():
        raise ValueError(f"no position counts in a batch of length {length}: all targets are {IGNORED}")
    again = problem.batch(split, 3, 4, length)
    if not all((a == b).all() for a, b in zip(batch, again, strict=True)):
        raise ValueError(f"batch 3 of split {split!r} differs when asked for again: draw it from its arguments alone")


def load_problem(path: str | Path, **options: Any) -> Problem:
    """The problem of one's own that ``path`` defines: a Python file with a function or class ``problem``.

    ``problem(**options)`` has to return an object that keeps the contract of `Problem`; small batches are checked.

    Raises:
        ValueError: it cannot be read or run, or does not keep the contract; the message says which.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a Python file that defines a function or class 'problem'")
    name = f"_m2rnn_problem_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: expected a Python file, whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    make = getattr(module, "problem", None)
    if not callable(make):
        raise ValueError(f"{path} defines no function or class 'problem', which would return the problem")
    try:
        problem: Problem = make(**options)
        check_problem(problem)
    except Exception as error:
        told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}{_line_in(path, error)}: {told}") from error
    return problem


def _line_in(path: Path, error: Exception) -> str:
    """Where in the file an error came up, ", line 7"; nothing if the file's own lines had no part in it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    return f", line {lines[-1]}" if lines else ""
