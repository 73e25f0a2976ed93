"""The problems draw what their protocols say, and how often."""

import numpy as np
import pytest

from m2rnn.tasks.problems import make_problem
from m2rnn.tasks.problems.mqar import TEST_GRID, TRAIN_GRID


def rows(name: str, length: int, count: int = 4000, **options):
    return make_problem(name, seed=3, **options).batch("train", 0, count, length)


def test_flip_flops_ignore_as_often_as_they_say():
    problem = make_problem("flip_flop")
    for variant, ignore in [(problem, 0.8), *zip(problem.variants().values(), (0.98, 0.1), strict=True)]:
        instructions = variant.batch("train", 0, 500, 512).inputs[:, 2:-2:2]
        assert abs((instructions == 4).mean() - ignore) < 0.005
        assert abs((instructions == 2).mean() - (1 - ignore) / 2) < 0.005


def test_brackets_split_uniformly_and_use_all_forms():
    inputs = rows("modular_arithmetic_brackets", 9).inputs
    # ( left operator right ): the left part has 1 to 5 tokens; what follows it tells.
    lengths = []
    for row in inputs.tolist():
        depth = 0
        for t, token in enumerate(row[1:], start=1):
            depth += (token == 8) - (token == 9)
            if depth == 0 and token in (5, 6) and t > 1:
                lengths.append(t - 1)
                break
    shares = np.bincount(lengths, minlength=6)[1:6] / len(inputs)
    assert abs(shares - 0.2).max() < 0.04
    deep = rows("modular_arithmetic_brackets", 40, products=True).inputs
    assert set(np.unique(deep)) == set(range(10))


def test_dyck_words_reach_their_depth_and_come_back():
    depths = rows("dyck_depth", 256, 500).targets
    assert depths.min() == 0
    assert depths.max() == 4
    free = (depths[:, :-1] > 0) & (depths[:, :-1] < 4)
    assert abs((np.diff(depths)[free] == 1).mean() - 0.5) < 0.02


def test_the_machine_of_keyed_automata_is_chosen_and_partly_reversible():
    transitions = make_problem("keyed_automata", states=7, letters=6).transitions
    for letter in range(0, 6, 2):
        assert sorted(transitions[:, letter]) == list(range(7))
    assert any(len(set(transitions[:, letter])) < 7 for letter in range(1, 6, 2))
    assert not (transitions == make_problem("keyed_automata", states=7, letters=6, machine=1).transitions).all()
    assert (transitions == make_problem("keyed_automata", states=7, letters=6, seed=9).transitions).all()


def test_mqar_has_the_pairs_of_the_reference():
    problem = make_problem("mqar")
    assert problem.pairs_at(256) == [16, 32, 64] == sorted(pairs for length, pairs in TRAIN_GRID if length == 256)
    assert problem.pairs_at(64) == [4, 8, 16] == sorted(pairs for length, pairs in TEST_GRID if length == 64)
    for length, pairs in TEST_GRID + TRAIN_GRID:
        assert pairs in problem.pairs_at(length)
        assert problem.variants()[f"{pairs} pairs"].pairs_at(length) == [pairs]
    asked = problem.batch("train", 0, 300, 256).mask.sum(axis=1)
    assert set(asked.tolist()) == {16, 32, 64}
    assert abs((asked == 32).mean() - 1 / 3) < 0.1


def test_mqar_asks_early_places_more_often_by_the_power_law():
    batch = rows("mqar", 64, pairs=1)  # one query among 31 places
    shares = batch.mask[:, 2::2].mean(axis=0)
    law = np.arange(1, 32) ** -0.99
    assert abs(shares - law / law.sum()).max() < 0.03
    uniform = rows("mqar", 64, pairs=1, power=1.0).mask[:, 2::2].mean(axis=0)
    assert abs(uniform - 1 / 31).max() < 0.015


def test_blanks_go_before_any_symbol():
    inputs = rows("selective_copying", 64).inputs
    symbols = inputs[:, :47] < 14
    assert (symbols.sum(axis=1) == 16).all()
    assert abs(symbols[:, 3:-3].mean(axis=0) - 1 / 3).max() < 0.05
    assert abs(symbols[:, 0].mean() - (15 / 16) ** 31) < 0.02  # none of the blanks before the first
    assert symbols[:, -1].all()


@pytest.mark.parametrize("symbols", [2, 26])
def test_half_of_the_palindromes_are_none(symbols):
    batch = rows("palindromes", 21, symbols=symbols)
    assert abs(batch.targets[:, -1].mean() - 0.5) < 0.04
    broken = batch.inputs[batch.targets[:, -1] == 0]
    where = (broken[:, :10] != broken[:, :10:-1]).mean(axis=0)
    assert abs(where - 0.1).max() < 0.03


def test_stacks_have_every_height_and_are_sometimes_empty():
    batch = rows("stack_manipulation", 21)
    heights = (batch.inputs[:, :10] < 2).sum(axis=1)
    assert abs(np.bincount(heights, minlength=10)[1:10] / 4000 - 1 / 9).max() < 0.03
    assert (batch.targets[:, 10] == 2).any()


def test_needles_lie_anywhere_and_each_is_asked_for():
    batch = rows("needle", 41)
    marked = batch.inputs[:, :-1] >= 64
    shares = marked[:, :-1].mean(axis=0)
    assert abs(shares[5:-5] - 4 / 39).max() < 0.03
    assert abs(np.bincount(batch.inputs[:, -1] - 64, minlength=4) / 4000 - 0.25).max() < 0.04


def test_noise_is_as_frequent_as_it_says_and_the_last_key_uniform():
    inputs = rows("noisy_recall", 127, 1000).inputs
    assert abs((inputs[:, :-3:2] >= 16).mean() - 0.2) < 0.01
    keys = np.bincount(inputs[:, -1], minlength=8)
    assert abs(keys / 1000 - 1 / 8).max() < 0.06


def test_fuzzy_keys_have_all_sizes_or_the_largest():
    def sizes(**options):
        inputs = rows("fuzzy_recall", 128, 300, **options).inputs
        is_key = np.pad((inputs < 7).astype(int), ((0, 0), (1, 1)))
        starts, ends = np.nonzero(np.diff(is_key) == 1)[1], np.nonzero(np.diff(is_key) == -1)[1]
        return np.bincount(ends - starts, minlength=4)[1:4] / len(starts)

    assert abs(sizes() - 1 / 3).max() < 0.03
    assert sizes(longest_keys=True).tolist() == [0, 0, 1]


def test_programs_reveal_as_often_as_they_say_and_use_every_statement():
    for name in ("traces", "traces_hidden", "boxes", "board"):
        problem = make_problem(name)
        inputs = problem.batch("train", 0, 400, 192).inputs
        operations = np.bincount(inputs[:, :-3:3].ravel(), minlength=problem.vocab_size) / inputs[:, :-3:3].size
        asks = problem.tables.tokens[-1, 0]
        assert abs(operations[asks] - 0.25) < 0.01
        assert set(np.flatnonzero(operations)) == set(problem.tables.tokens[:, 0])
        assert set(np.unique(inputs)) == set(np.unique(np.arange(problem.vocab_size))) - unused(problem)


def unused(problem) -> set[int]:
    """The operations that happen or not are tokens of every trace, used or not."""
    return {problem.vocab_size - 2, problem.vocab_size - 1} if problem.name == "traces" else set()


def test_what_is_hidden_leaves_many_answers_certain_but_not_all():
    problem = make_problem("traces_hidden")
    inputs, targets = problem.batch("train", 0, 400, 192)
    asked = inputs[:, 0::3] == problem.tables.tokens[-1, 0]
    certain = (targets[:, 1::3] >= 0)[asked].mean()
    assert 0.6 < certain < 0.9
    more = make_problem("traces_hidden", hidden=0.6).batch("train", 0, 400, 192)
    assert (more.targets >= 0).mean() < (targets >= 0).mean()


def test_every_machine_reaches_all_of_its_states():
    for name in ("traces", "boxes", "board"):
        tables = make_problem(name).tables
        reached, frontier = {tables.start}, {tables.start}
        while frontier:
            frontier = set(np.unique(tables.outcomes[0][:, sorted(frontier)]).tolist()) - reached
            reached |= frontier
        assert len(reached) == tables.outcomes.shape[2]


BAD_OPTIONS = [
    ("parity", {"answers": "first"}, "answers 'first'"),
    ("cycle_navigation", {"places": 1}, "places 1"),
    ("modular_arithmetic", {"modulus": 1}, "modulus 1"),
    ("flip_flop", {"ignore": 1.5}, "ignore 1.5: expected a probability"),
    ("dyck", {"depth": 0}, "depth 0"),
    ("keyed_automata", {"keys": 0}, "keys 0"),
    ("mqar", {"vocabulary": 3}, "vocabulary 3"),
    ("mqar", {"power": 0}, "power 0"),
    ("mqar", {"filler": "noise"}, "filler 'noise': expected 'random' or 'zero'"),
    ("selective_copying", {"vocabulary": 2}, "vocabulary 2"),
    ("palindromes", {"symbols": 1}, "symbols 1"),
    ("needle", {"needles": 0}, "needles 0"),
    ("noisy_recall", {"noise": -0.1}, "noise -0.1"),
    ("fuzzy_recall", {"vocabulary": 6}, "vocabulary 6: expected a whole number of at least 7"),
    ("memorisation", {"vocabulary": 2}, "vocabulary 2"),
    ("traces", {"variables": 9}, "variables 9, modulus 5: 1953125 states"),
    ("traces", {"reveals": 2}, "reveals 2"),
    ("traces", {"hidden": -1}, "hidden -1"),
    ("boxes", {"objects": 0}, "objects 0"),
    ("boxes", {"objects": 9, "boxes": 9}, "objects 9, boxes 9: 387420489 states"),
    ("board", {"pieces": 10}, "pieces 10: expected at most one for each of the 9 squares"),
    ("board", {"pieces": 6, "height": 5, "width": 5}, "states"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD_OPTIONS)
def test_options_that_cannot_work_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_problem(name, **options)
