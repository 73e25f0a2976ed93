"""Synthetic problems with exact answers: a generator and a scorer each, in numpy, which know no model.

`PROBLEMS` lists them. Start with `contract` (what a problem is), then `generate` (how batches are drawn), then any one.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from m2rnn.tasks.problems.arithmetic import ModularArithmetic, ModularArithmeticBrackets
from m2rnn.tasks.problems.automata import CycleNavigation, EvenPairs, Parity
from m2rnn.tasks.problems.board import Board
from m2rnn.tasks.problems.boxes import Boxes
from m2rnn.tasks.problems.bucket_sort import BucketSort
from m2rnn.tasks.problems.compression import Compression
from m2rnn.tasks.problems.contract import IGNORED, SPLITS, Batch, Problem, Score, Split, check_problem, load_problem
from m2rnn.tasks.problems.copying import Copying, Reversing
from m2rnn.tasks.problems.dyck import Dyck
from m2rnn.tasks.problems.flip_flop import FlipFlop
from m2rnn.tasks.problems.fuzzy_recall import FuzzyRecall
from m2rnn.tasks.problems.generate import Draws, ExactProblem
from m2rnn.tasks.problems.in_context_recall import InContextRecall
from m2rnn.tasks.problems.keyed_automata import KeyedAutomata
from m2rnn.tasks.problems.memorisation import Memorisation
from m2rnn.tasks.problems.mqar import MQAR
from m2rnn.tasks.problems.needle import Needle
from m2rnn.tasks.problems.palindromes import Palindromes
from m2rnn.tasks.problems.phonebook import Phonebook
from m2rnn.tasks.problems.selective_copying import SelectiveCopying
from m2rnn.tasks.problems.stack_manipulation import StackManipulation
from m2rnn.tasks.problems.traces import Traces
from m2rnn.tasks.problems.word_problem import MAX_ORDER, Group, WordProblem

__all__ = [
    "IGNORED", "PROBLEMS", "SPLITS", "Batch", "Draws", "ExactProblem", "Group", "Problem", "Score", "Split",
    "WordProblem", "check_problem", "describe", "load_problem", "make_problem",
]  # fmt: skip

PROBLEMS: dict[str, Callable[..., Problem]] = {
    # State: what a finite automaton tracks.
    "parity": Parity,
    "even_pairs": EvenPairs,
    "cycle_navigation": CycleNavigation,
    "modular_arithmetic": ModularArithmetic,
    "modular_arithmetic_brackets": ModularArithmeticBrackets,
    "flip_flop": FlipFlop,
    "dyck": Dyck,
    "dyck_depth": partial(Dyck, answer="depth"),
    "keyed_automata": KeyedAutomata,
    # Memory: what has to be kept and found again.
    "mqar": MQAR,
    "selective_copying": SelectiveCopying,
    "copying": Copying,
    "reversing": Reversing,
    "palindromes": Palindromes,
    "bucket_sort": BucketSort,
    "stack_manipulation": StackManipulation,
    "phonebook": Phonebook,
    "needle": Needle,
    "in_context_recall": InContextRecall,
    "noisy_recall": partial(InContextRecall, noise=0.2),
    "fuzzy_recall": FuzzyRecall,
    "compression": Compression,
    "memorisation": Memorisation,
    # Programs and entities: what changes, statement by statement, and is shown now and then.
    "traces": Traces,
    "traces_hidden": partial(Traces, hidden=0.2),
    "boxes": Boxes,
    "board": Board,
}


def make_problem(name: str, **options: object) -> Problem:
    """The problem ``name`` of `PROBLEMS`, the group of that name, or one's own, if ``name`` ends in .py.

    ``options`` are the fields of the problem, such as ``seed``. ``ValueError`` for what does not exist.
    """
    if name.endswith(".py"):
        return load_problem(name, **options)
    make = PROBLEMS.get(name)
    if make is None:
        try:
            make = partial(WordProblem, Group.from_name(name))
        except ValueError:
            raise ValueError(
                f"task {name!r}: expected {', '.join(PROBLEMS)}, a group (S3 to S5, A3 to A5, Z2 to Z{MAX_ORDER} "
                "or a product such as S3xZ2), or a path ending in .py"
            ) from None
    fields = [field for field in inspect.signature(make).parameters if field != "group"]
    if unknown := [option for option in options if option not in fields]:
        raise ValueError(f"task {name!r} has no option {unknown[0]!r}; expected {', '.join(fields) or 'none'}")
    try:
        return make(**options)
    except TypeError as error:
        raise ValueError(f"task {name!r} cannot be made from {options}: {error}") from error


def describe(name: str) -> dict[str, Any]:
    """A problem in a few words and numbers, which are JSON."""
    problem, make = make_problem(name), PROBLEMS[name]
    summary = (inspect.getdoc(type(problem)) or "").partition("\n")[0]
    if isinstance(make, partial):  # a variant: what sets it apart from the task whose docstring it shares
        variant = ", ".join(f"{field}={value}" for field, value in make.keywords.items())
        summary = f"{summary.removesuffix('.')} ({variant})."
    return {
        "name": name,
        "summary": summary,
        "source": problem.source,
        "vocab_size": problem.vocab_size,
        "train_lengths": list(problem.train_lengths),
        "test_lengths": list(problem.test_lengths),
    }
