"""What holds for every problem: exact answers, batches that never change, splits that share nothing, every length."""

import hashlib
import inspect
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from m2rnn.tasks.problems import IGNORED, PROBLEMS, SPLITS, Problem, check_problem, make_problem
from tests.tasks.problems.solvers import SOLVERS

# Of batch 5 of the training split of seed 1, two sequences of the shortest test length. A change of one is a change of
# every run that goes on from a checkpoint.
DIGESTS: dict[str, str] = {
    "parity": "af172c0dba8b9d19",
    "even_pairs": "455844d38d3712f6",
    "cycle_navigation": "a08b7bc7c7e4a61d",
    "modular_arithmetic": "d9a33c7a35717319",
    "modular_arithmetic_brackets": "e1067e13cc6c1b56",
    "flip_flop": "de27ee6b069193d2",
    "dyck": "ecb3075226287ea2",
    "dyck_depth": "cd44eb159d64fc42",
    "keyed_automata": "bb779b1707487f77",
    "mqar": "9587534aae55a13c",
    "selective_copying": "fbf27d87d56c2607",
    "copying": "e5c041c34babe024",
    "reversing": "7198cdbb078bbf81",
    "palindromes": "4ec0b7d451de2422",
    "bucket_sort": "c375f9cd5e7d3af3",
    "stack_manipulation": "3a25a300fac4fb7a",
    "phonebook": "5864b0775305d7d2",
    "needle": "792a6d54dcbdd332",
    "in_context_recall": "ebcf972a11ac2053",
    "noisy_recall": "73edf7dfb277686f",
    "fuzzy_recall": "30fbd495f508bf50",
    "compression": "cc861e8fb9f8de8d",
    "memorisation": "a23bfebaf41346be",
    "traces": "c3a13013e391cc27",
    "traces_hidden": "f15a0dad0ce17598",
    "boxes": "31ddd9379626884a",
    "board": "7798b4e88785dbba",
}

# Other options, each at its edges: the smallest vocabularies, and whatever else a branch depends on.
OPTIONS: dict[str, list[dict]] = {
    "parity": [{"answers": "all"}],
    "even_pairs": [{"answers": "all"}],
    "cycle_navigation": [{"places": 2, "answers": "all"}, {"places": 7}],
    "modular_arithmetic": [{"modulus": 2, "answers": "all"}, {"modulus": 10}],
    "modular_arithmetic_brackets": [{"modulus": 2}, {"modulus": 7, "products": True}],
    "flip_flop": [{"ignore": 0.98}, {"ignore": 0.1}, {"ignore": 0}, {"ignore": 1}],
    "dyck": [{"kinds": 1, "depth": 1}, {"kinds": 1, "depth": 3}, {"kinds": 3, "depth": 1}, {"kinds": 2, "depth": 30}],
    "dyck_depth": [{"kinds": 1, "depth": 5}],
    "keyed_automata": [{"keys": 1, "states": 1, "letters": 1}, {"keys": 9, "states": 2, "letters": 3, "machine": 5}],
    "mqar": [{"vocabulary": 4}, {"pairs": 4, "filler": "zero"}, {"pairs": 300, "power": 1.0}, {"vocabulary": 64}],
    "selective_copying": [{"vocabulary": 3}, {"count": 1}, {"vocabulary": 128, "count": 96}],
    "copying": [{"symbols": 2}],
    "reversing": [{"symbols": 10}],
    "palindromes": [{"symbols": 2}, {"symbols": 26}],
    "bucket_sort": [{"symbols": 1}, {"symbols": 9}],
    "stack_manipulation": [],
    "phonebook": [{"names": 1}, {"names": 3}],
    "needle": [{"symbols": 1, "needles": 1}, {"needles": 16}],
    "in_context_recall": [{"symbols": 2}, {"symbols": 3}, {"symbols": 128}],
    "noisy_recall": [{"noise": 0.8}, {"noise": 1.0, "symbols": 3, "noise_symbols": 1}],
    "fuzzy_recall": [{"longest_keys": True}, {"vocabulary": 3, "size": 1}, {"vocabulary": 9, "size": 2}],
    "compression": [{"symbols": 1}, {"symbols": 127}],
    "memorisation": [{"vocabulary": 3}, {"vocabulary": 8192, "dictionary": 1}],
    "traces": [{"variables": 1, "modulus": 2}, {"variables": 4, "modulus": 3}, {"reveals": 0}, {"reveals": 1}],
    "traces_hidden": [{"variables": 1, "modulus": 2}, {"variables": 4, "modulus": 3, "hidden": 0.6}, {"hidden": 1.0}],
    "boxes": [{"objects": 1, "boxes": 1}, {"objects": 6, "boxes": 2}, {"objects": 2, "boxes": 7}],
    "board": [
        {"pieces": 1, "height": 1, "width": 1},
        {"pieces": 4, "height": 2, "width": 2},
        {"pieces": 2, "width": 5},
    ],
}

# Where the state is hidden in part, there are sequences none of whose questions has a certain answer.
WITHOUT_CERTAIN_ANSWERS = {"traces_hidden"}


@pytest.fixture(params=PROBLEMS)
def problem(request: pytest.FixtureRequest) -> Problem:
    return make_problem(request.param, seed=1)


def test_every_problem_is_tested():
    assert set(SOLVERS) == set(OPTIONS) == set(DIGESTS) == set(PROBLEMS)


@pytest.mark.parametrize("name", PROBLEMS)
def test_names_are_those_of_the_table(name):
    assert make_problem(name).name == name


def test_it_keeps_the_contract(problem):
    check_problem(problem)
    assert isinstance(problem, Problem)
    assert problem.source
    assert max(problem.test_lengths) >= 4 * problem.train_lengths[1]


CASES = [(name, options) for name, cases in OPTIONS.items() for options in [{}, *cases]]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name}-{options}" for name, options in CASES])
def test_answers_are_those_of_a_slow_solver(name, options):
    problem = make_problem(name, seed=2, **options)
    shortest, longest = problem.min_length, problem.train_lengths[1]
    for length in sorted({*range(shortest, shortest + 12), 41, 64, longest, longest + 1}):
        if length < shortest:
            continue
        for split in ("train", "test"):
            batch = problem.batch(split, 3, 6, length)
            assert batch.inputs.shape == batch.targets.shape == (6, length)
            assert batch.inputs.dtype == batch.targets.dtype == np.int64
            assert 0 <= batch.inputs.min() <= batch.inputs.max() < problem.vocab_size
            answers = batch.targets[batch.mask]
            assert answers.size
            assert 0 <= answers.min() <= answers.max() < problem.vocab_size
            for inputs, targets, scored in zip(*(part.tolist() for part in (*batch, batch.mask)), strict=True):
                assert SOLVERS[name](inputs, problem, scored) == targets


def test_every_sequence_has_an_answer(problem):
    for length in (problem.min_length, problem.min_length + 1, problem.train_lengths[1]):
        answered = problem.batch("train", 0, 64, length).mask.any(axis=1)
        assert answered.mean() > 0.5 if problem.name in WITHOUT_CERTAIN_ANSWERS else answered.all()


def digest(problem: Problem) -> str:
    batch = problem.batch("train", 5, 2, problem.test_lengths[0])
    return hashlib.sha256(b"".join(tokens.astype("<i8").tobytes() for tokens in batch)).hexdigest()[:16]


@pytest.mark.parametrize("name", PROBLEMS)
def test_batches_never_change(name):
    assert digest(make_problem(name, seed=1)) == DIGESTS.get(name)


def test_a_batch_depends_on_its_arguments_alone(problem):
    length = problem.train_lengths[1]

    def inputs(index: int = 4, split: str = "train", like: Problem = problem) -> np.ndarray:
        return like.batch(split, index, 16, length).inputs

    first = inputs()
    inputs(index=5)
    assert (inputs() == first).all()
    for other in (inputs(index=5), inputs(split="test"), inputs(like=replace(problem, seed=2))):
        assert not (other == first).all()


def test_splits_share_no_sequence(problem):
    length = next(n for n in range(problem.min_length, 200) if problem.splits_are_disjoint(n))
    for n in (length, length + 1, problem.train_lengths[1]):
        rows = {split: set() for split in SPLITS}
        for split in SPLITS:
            for seed in (0, 1):
                batch = replace(problem, seed=seed).batch(split, 0, 300, n)
                rows[split] |= {row.tobytes() for row in batch.inputs}
        assert all(rows.values())
        assert not rows["train"] & rows["test"]
        assert not rows["train"] & rows["validation"]
        assert not rows["validation"] & rows["test"]


def test_short_lengths_have_full_batches_in_every_split(problem):
    for length in range(problem.min_length, problem.min_length + 10):
        for split in SPLITS:
            assert problem.batch(split, 0, 50, length).inputs.shape == (50, length)
    assert problem.batch("test", 0, 0, problem.min_length).inputs.shape == (0, problem.min_length)


def test_bad_arguments_are_named(problem):
    with pytest.raises(ValueError, match=f"length {problem.min_length - 1}.*at least {problem.min_length}"):
        problem.batch("train", 0, 1, problem.min_length - 1)
    with pytest.raises(ValueError, match="split 'valid'"):
        problem.batch("valid", 0, 1, problem.min_length)
    with pytest.raises(ValueError, match="seed -1"):
        replace(problem, seed=-1)


def test_variants_have_the_same_tokens(problem):
    for variant in problem.variants().values():
        check_problem(variant)
        assert variant.vocab_size == problem.vocab_size


def test_a_million_tokens_take_a_core_seconds_at_most(problem):
    length, tokens, index = problem.train_lengths[1], 0, 0
    began = time.process_time()
    while tokens < 2**17:
        tokens += problem.batch("train", index, 128, length).inputs.size
        index += 1
    # A million a second on an idle core; a quarter of that on a busy one.
    assert tokens / (time.process_time() - began) > 250_000


def test_targets_that_do_not_count_are_what_pytorch_ignores():
    assert inspect.signature(torch.nn.functional.cross_entropy).parameters["ignore_index"].default == IGNORED
