"""The contract of a problem: scores of the positions that count, draws, and files of one's own."""

import re
from pathlib import Path

import numpy as np
import pytest

from m2rnn.tasks.problems import (
    IGNORED,
    Batch,
    Draws,
    Group,
    Problem,
    Score,
    WordProblem,
    check_problem,
    load_problem,
    make_problem,
)
from m2rnn.tasks.problems.automata import Parity


def test_a_score_counts_what_is_not_ignored():
    targets = np.array([[IGNORED, 1, 2, IGNORED], [IGNORED, 1, 2, 3]])
    predictions = np.array([[0, 1, 2, 0], [0, 1, 0, 0]])
    score = Score(4)
    score.add(predictions, targets)
    assert (score.sequences, score.sequences_right) == (2, 1)
    assert (score.answers, score.errors) == (5, 2)
    assert score.by_position()[1:].tolist() == [1, 0.5, 0]
    assert np.isnan(score.by_position()[0])
    assert score.accuracy() == pytest.approx(3 / 5)
    assert np.isnan(score.accuracy(0, 1))
    assert score.last_quarter() == 0


def test_a_mask_says_which_positions_count():
    batch = Batch(np.zeros((1, 3), dtype=np.int64), np.array([[IGNORED, 0, 5]]))
    assert batch.mask.tolist() == [[False, True, True]]


def test_word_problems_keep_the_contract():
    problem = WordProblem(Group.from_name("S3"))
    assert isinstance(problem, Problem)
    check_problem(problem)
    assert make_problem("S3", seed=4).seed == 4
    assert make_problem("A5").vocab_size == 60


def draws() -> Draws:
    return Draws((1, 2), (3, 4, 5))


def test_draws_are_uniform():
    count = 60_000
    for numbers, kinds in [
        (draws().integers(6, count), 6),
        (draws().distinct(200, count // 10, 10) // 20, 10),
        (draws().distinct(6, count // 6, 3)[:, 2], 6),
        (draws().orders(count, 5)[:, 3], 5),
        (draws().happens(0.5, count).astype(int), 2),
    ]:
        seen = np.bincount(numbers.ravel(), minlength=kinds)
        expected = numbers.size / kinds
        assert abs(seen - expected).max() < 5 * expected**0.5
    assert abs(draws().happens(0.98, count).mean() - 0.98) < 0.003
    assert not draws().happens(0, count).any()
    assert draws().happens(1, count).all()


def test_different_numbers_are_different_and_in_random_order():
    for below, count in [(5, 5), (20, 5), (21, 5), (1000, 64), (4095, 256), (1, 1)]:
        numbers = draws().distinct(below, 50, count)
        assert all(len(set(row)) == count and max(row) < below for row in numbers.tolist())
    rising = (np.diff(draws().distinct(1000, 5000, 2)) > 0).mean()
    assert abs(rising - 0.5) < 0.05
    with pytest.raises(ValueError, match="6 different tokens of 5"):
        draws().distinct(5, 1, 6)


def test_integers_below_an_array_stay_below_each():
    below = np.array([1, 2, 1000])
    numbers = draws().integers(below, 2000, 3)
    assert (numbers.max(axis=0) < below).all()
    assert numbers[:, 2].max() > 900


OWN = '''
import numpy as np
from dataclasses import dataclass
from m2rnn.tasks.problems import IGNORED, Batch, Draws, ExactProblem

@dataclass(frozen=True)
class Successor(ExactProblem):
    """The next number."""

    numbers: int = 8
    name = "successor"
    source = "nobody"
    train_lengths = (4, 16)
    test_lengths = (16, 32)

    @property
    def vocab_size(self):
        return self.numbers

    def entropy(self, length):
        return 3 * length

    def generate(self, draws: Draws, rows, length):
        inputs = draws.integers(self.numbers, rows, length)
        return Batch(inputs, (inputs + 1) % self.numbers)

problem = Successor
'''


def write(folder: Path, text: str) -> Path:
    path = folder / "own.py"
    path.write_text(text)
    return path


def test_a_problem_of_ones_own_comes_from_a_file(tmp_path):
    path = write(tmp_path, OWN)
    problem = load_problem(path, numbers=5, seed=3)
    batch = problem.batch("train", 0, 4, 10)
    assert problem.vocab_size == 5
    assert (batch.targets == (batch.inputs + 1) % 5).all()
    assert make_problem(str(path)).vocab_size == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("problem = Successor", ""), "defines no function or class 'problem'"),
        (("problem = Successor", "problem = lambda: 3"), "int has no batch, .*name, .*vocab_size"),
        (("problem = Successor", "problem = lambda: 1 / 0"), "ZeroDivisionError"),
        (("import numpy", "import no_such_module_as_this"), "cannot be run: ModuleNotFoundError.*no_such_module"),
        (("@dataclass", "@dataclass("), "cannot be run: SyntaxError"),
        (("(4, 16)", "(16, 4)"), "train_lengths .16, 4.: expected"),
        (("(16, 32)", "(32, 16)"), "test_lengths .32, 16.: expected increasing"),
        (("return self.numbers", "return 4"), "inputs go from 0 to 7: expected tokens from 0 to vocab_size - 1 = 3"),
        (("(inputs + 1) % self.numbers", "inputs + 1"), "targets go from 1 to 8: expected .* 7, or -100"),
        (("(inputs + 1) % self.numbers", "inputs * 0 + IGNORED"), "no position counts"),
        (("(inputs + 1) % self.numbers", "inputs[:, 1:]"), r"targets .* are int64 \(4, 15\): expected int64 \(4, 16\)"),
        (("(inputs + 1) % self.numbers", "inputs / 2"), "targets .* are float64"),
        (
            ("(inputs + 1) % self.numbers", "np.random.default_rng().integers(8, size=(rows, length))"),
            "batch 3 .* differs",
        ),
    ],
)
def test_a_file_that_breaks_the_contract_is_told_how(tmp_path, change, message):
    assert change[0] in OWN
    path = write(tmp_path, OWN.replace(*change))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        load_problem(path)


def test_an_error_in_ones_own_file_names_its_line(tmp_path, monkeypatch):
    source = OWN.replace("problem = Successor", "def problem():\n    return [][0]")
    write(tmp_path, source)
    monkeypatch.chdir(tmp_path)
    (own,) = Path().glob("*.py")
    line = source.splitlines().index("    return [][0]") + 1
    with pytest.raises(ValueError, match=rf"^{own}, line {line}: IndexError"):
        load_problem(own)


def test_splits_that_share_sequences_are_found():
    class Shared(Parity):
        def batch(self, split, index, batch_size, length):
            return super().batch("train", index, batch_size, length)

    with pytest.raises(ValueError, match="splits share sequences of length 40"):
        check_problem(Shared())


def test_what_is_no_python_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_problem(tmp_path / "missing.py")
    (tmp_path / "own.txt").write_text(OWN)
    with pytest.raises(ValueError, match=r"ends in \.py"):
        load_problem(tmp_path / "own.txt")


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match=r"task 'partiy': expected parity, even_pairs, .* a group \(S3 .* Z2048"):
        make_problem("partiy")
    with pytest.raises(ValueError, match=r"task 'dyck' has no option 'colours'; expected .*depth"):
        make_problem("dyck", colours=3)
