"""Word problems: exact tables and targets, splits that share nothing, batches that depend on their number."""

import re
from itertools import permutations, product

import numpy as np
import pytest

from m2rnn.tasks import Group, Score, WordProblem
from m2rnn.tasks.problems.word_problem import check_group_axioms, in_split

ORDERS = {
    "S3": 6, "S4": 24, "S5": 120, "A3": 3, "A4": 12, "A5": 60, "Z2": 2, "Z5": 5, "Z60": 60, "parity": 2,
    "S3xZ2": 12, "Z2xZ2": 4, "A4xparity": 24, "Z2xZ3xS3": 36,
}  # fmt: skip
COMMUTATIVE = {"A3", "Z2", "Z5", "Z60", "parity", "Z2xZ2"}
SPLITS = ("train", "validation", "test")


@pytest.fixture(params=ORDERS, scope="module")
def group(request: pytest.FixtureRequest) -> Group:
    return Group.from_name(request.param)


def test_tables_are_groups(group):
    table, numbers = group.table, range(group.order)
    assert group.order == ORDERS[group.name]
    assert set(table.ravel().tolist()) == set(numbers)
    assert all(table[0, a] == a == table[a, 0] for a in numbers)
    assert all(sum(table[a] == 0) == 1 and table[np.flatnonzero(table[a] == 0)[0], a] == 0 for a in numbers)
    for a in numbers:  # (a b) c == a (b c), for all b and c at once
        assert (table[table[a]] == table[a][table]).all()


def test_only_the_commutative_groups_commute(group):
    assert (group.table == group.table.T).all() == (group.name in COMMUTATIVE)


def test_generators_generate(group):
    reached = {0}
    while True:
        grown = reached | {int(group.table[a, g]) for a in reached for g in group.generators}
        if grown == reached:
            break
        reached = grown
    assert len(reached) == group.order


# Identity, inverses, every element once in each row and column, and yet no group.
LOOP_OF_FIVE = [[0, 1, 2, 3, 4], [1, 0, 3, 4, 2], [2, 4, 0, 1, 3], [3, 2, 4, 0, 1], [4, 3, 1, 2, 0]]


@pytest.mark.parametrize(
    ("table", "generators", "message"),
    [
        ([[0, 1], [1, 2]], (1,), "not closed"),
        ([[1, 0], [0, 1]], (1,), "identity"),
        ([[0, 1], [1, 1]], (1,), "inverse"),
        (LOOP_OF_FIVE, (1, 2), "associative"),
        ([[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]], (2,), "generate"),
    ],
)
def test_a_table_that_is_no_group_is_refused(table, generators, message):
    with pytest.raises(ValueError, match=message):
        check_group_axioms(np.array(table), generators)


NO_GROUPS = ["", "S", "S2", "S6", "s3", "Z", "Z1", "Z0", "Z4096", "S3x", "xS3", "S3*Z2", "Z-3", "S5xA5"]


@pytest.mark.parametrize("name", NO_GROUPS)
def test_an_unknown_group_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"group '?{re.escape(name)}.* expected"):
        Group.from_name(name)


@pytest.mark.parametrize(("name", "points"), [("S3", 3), ("S4", 4), ("S5", 5)])
def test_targets_are_the_permutations_applied_one_after_the_other(name, points):
    elements = list(permutations(range(points)))
    batch = WordProblem(Group.from_name(name)).batch("train", 0, 16, 50)
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        where = list(range(points))  # where[i]: the place that the token which began at i has now
        for element, target in zip(inputs, targets, strict=True):
            where = [elements[element][place] for place in where]
            assert tuple(where) == elements[target]


def test_targets_of_cyclic_groups_and_products_are_sums():
    batch = WordProblem(Group.from_name("Z60")).batch("test", 3, 8, 100)
    assert (batch.targets == batch.inputs.cumsum(axis=1) % 60).all()
    bits, parity = WordProblem(Group.from_name("parity")).batch("train", 0, 8, 100)
    assert (parity == np.bitwise_xor.accumulate(bits, axis=1)).all()
    inputs, targets = WordProblem(Group.from_name("S3xZ4")).batch("train", 1, 8, 100)
    assert (targets // 4 == Group.from_name("S3").running_products(inputs // 4)).all()
    assert (targets % 4 == (inputs % 4).cumsum(axis=1) % 4).all()


def test_generators_as_inputs_still_reach_every_product():
    problem = WordProblem(Group.from_name("S5"), inputs="generators")
    inputs, targets = problem.batch("train", 0, 64, 200)
    assert set(np.unique(inputs)) == {0, *problem.group.generators}
    assert set(np.unique(targets)) == set(range(120))
    assert (targets == problem.group.running_products(inputs)).all()


def test_elements_come_in_the_order_of_how_many_generators_they_take():
    problem = WordProblem(Group.from_name("A4"))
    table, generators = problem.group.table, problem.group.generators
    taken = {0: 0}  # by trying all words: the identity stands for a shorter one
    for length in range(1, 6):
        for word in product(generators, repeat=length):
            element = 0
            for letter in word:
                element = table[element, letter]
            taken.setdefault(int(element), length)
    order = problem.by_word_length.tolist()
    assert sorted(order) == list(range(12))
    lengths = [taken[element] for element in order]
    assert lengths == sorted(lengths)
    assert set(order[:3]) == {0, *generators}


def test_a_batch_of_some_inputs_has_the_first_of_them_and_their_products():
    problem = WordProblem(Group.from_name("A5"))
    inputs, targets = problem.batch("train", 3, 64, 20, inputs=9)
    assert set(np.unique(inputs)) == set(problem.by_word_length[:9].tolist())
    assert (targets == problem.group.running_products(inputs)).all()
    assert in_split(inputs, "train").all()
    for a, b in zip(problem.batch("train", 3, 64, 20, inputs=60), problem.batch("train", 3, 64, 20), strict=True):
        assert (a == b).all()


def test_inputs_and_targets_are_uniform():
    problem = WordProblem(Group.from_name("S3"))
    inputs, targets = problem.batch("train", 0, 4096, 32)
    expected, deviation = 4096 / 6, (4096 * 5 / 36) ** 0.5
    for t in (0, 1, 31):
        for tokens in (inputs, targets):
            assert (abs(np.bincount(tokens[:, t], minlength=6) - expected) < 5 * deviation).all()


@pytest.mark.parametrize(
    ("name", "inputs", "length"), [("S3", "all", 4), ("parity", "all", 10), ("S5", "generators", 6)]
)
def test_every_sequence_belongs_to_one_split(name, inputs, length):
    problem = WordProblem(Group.from_name(name), inputs)
    everything = np.array(list(product(problem.alphabet, repeat=length)))
    members = np.stack([in_split(everything, split) for split in SPLITS])
    assert (members.sum(axis=0) == 1).all()
    shares = members.mean(axis=1)
    assert abs(shares - [6 / 8, 1 / 8, 1 / 8]).max() < 0.06
    owners = [SPLITS[i] for i in members.argmax(axis=0)]
    owner = {tuple(row): split for row, split in zip(everything.tolist(), owners, strict=True)}
    assert problem.splits_are_disjoint(length)
    for split in SPLITS:
        for seed in (0, 1):
            rows = WordProblem(problem.group, inputs, seed).batch(split, 0, 2000, length).inputs
            assert {owner[tuple(row)] for row in rows.tolist()} == {split}


def test_where_too_few_sequences_exist_the_splits_share_them():
    problem = WordProblem(Group.from_name("parity"))
    assert not problem.splits_are_disjoint(7)
    assert problem.splits_are_disjoint(8)
    for split in SPLITS:
        rows = problem.batch(split, 0, 200, 3).inputs
        assert len(np.unique(rows, axis=0)) == 8


def test_a_batch_depends_on_its_number_alone():
    def batch(seed=7, split="train", index=41, rows=32, length=20):
        return WordProblem(Group.from_name("S3"), seed=seed).batch(split, index, rows, length).inputs

    first = batch()
    batch(index=40)
    assert (batch() == first).all()
    for other in (batch(seed=8), batch(index=42), batch(split="validation"), batch(split="test")):
        assert not (other == first).all()
    assert len(np.unique(np.concatenate([batch(index=i) for i in range(20)]), axis=0)) == 20 * 32


PINNED_INPUTS = [[2, 5, 2, 0, 2, 5, 3, 3], [1, 5, 5, 4, 5, 2, 1, 0]]


def test_batches_are_the_same_on_every_machine():
    inputs, targets = WordProblem(Group.from_name("S3"), seed=1).batch("test", 5, 2, 8)
    assert inputs.tolist() == PINNED_INPUTS
    assert targets.tolist() == Group.from_name("S3").running_products(np.array(PINNED_INPUTS)).tolist()


def test_empty_batches():
    problem = WordProblem(Group.from_name("S3"))
    assert problem.batch("train", 0, 0, 5).inputs.shape == (0, 5)
    assert problem.batch("train", 0, 5, 0).targets.shape == (5, 0)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="inputs 'some'"):
        WordProblem(Group.from_name("S3"), inputs="some")
    with pytest.raises(ValueError, match="seed -1"):
        WordProblem(Group.from_name("S3"), seed=-1)


def test_score_counts_by_position_and_range():
    targets = np.zeros((4, 10), dtype=np.int64)
    wrong_late = targets.copy()
    wrong_late[0, 7:] = 1
    wrong_late[1, 9] = 1
    score = Score(10)
    score.add(wrong_late[:2], targets[:2])
    score.add(wrong_late[2:], targets[2:])
    assert score.sequences == 4
    assert score.by_position().tolist() == [1] * 7 + [0.75, 0.75, 0.5]
    assert score.accuracy() == pytest.approx(0.9)
    assert score.accuracy(0, 7) == 1
    assert score.last_quarter() == pytest.approx((0.75 + 0.75 + 0.5) / 3)
    assert score.in_buckets(2) == [(0, 5, 1.0), (5, 10, pytest.approx(0.8))]
    assert [(a, b) for a, b, _ in score.in_buckets(99)] == [(i, i + 1) for i in range(10)]
    with pytest.raises(ValueError, match="predictions"):
        score.add(targets[:, :5], targets)
