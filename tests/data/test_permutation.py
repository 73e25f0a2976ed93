"""A permutation: every number once, in an order that depends on the key and looks random."""

import numpy as np
import pytest

from m2rnn.data.permutation import mixed_key, permuted

GOLDEN = [2, 3, 8, 4, 0, 1, 7, 9, 5, 6]
GOLDEN_LARGE = [506350954849, 689305267073, 949073328860]


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1023, 1025, 4097])
def test_every_number_comes_once(size):
    for key in (0, 2**64 - 1):
        assert sorted(permuted(np.arange(size), size, key)) == list(range(size))


def test_a_place_has_its_number_whatever_else_is_asked_for():
    whole = permuted(np.arange(1000), 1000, 7)
    assert [int(permuted(np.array([place]), 1000, 7)[0]) for place in range(0, 1000, 37)] == whole[::37].tolist()


def test_the_order_never_changes():
    """Else a resumed training would read other text."""
    assert permuted(np.arange(10), 10, mixed_key(0, 0)).tolist() == GOLDEN
    assert permuted(np.array([0, 1, 10**12]), 10**12 + 1, mixed_key(3, 1)).tolist() == GOLDEN_LARGE


def test_orders_look_random():
    size, keys = 64, 4000
    orders = np.stack([permuted(np.arange(size), size, mixed_key(0, key)) for key in range(keys)])
    # Every place holds every number equally often.
    counts = np.zeros((size, size))
    for order in orders:
        counts[np.arange(size), order] += 1
    expected = keys / size
    chi = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)
    # Neighbours are no closer than strangers, and each number follows each other one equally often.
    follows = np.zeros((size, size))
    np.add.at(follows, (orders[:, :-1].ravel(), orders[:, 1:].ravel()), 1)
    others = follows[~np.eye(size, dtype=bool)]
    chi = ((others - others.mean()) ** 2 / others.mean()).sum()
    assert abs(chi - len(others)) < 5 * np.sqrt(2 * len(others))
