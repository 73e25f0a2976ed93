"""A pseudo-random permutation of any size that needs no memory and gives the same order with every version of numpy."""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
WORD = 2**64 - 1


def permuted(places: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Where a permutation of ``range(size)`` chosen by ``key`` puts ``places``, in time and memory of ``places`` alone.

    A Feistel network permutes the numbers of an even number of bits; what falls outside of ``range(size)`` goes
    through it again until it is inside (cycle walking), at most four times on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64(2**half - 1)
    keys = [mixed_key(key, number) for number in range(ROUNDS)]
    result = places.astype(np.uint64)
    outside = np.ones(result.shape, bool)
    while outside.any():
        left, right = result[outside] >> shift, result[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + np.uint64(round_key)) & mask)
        result[outside] = left << shift | right
        outside = result >= size
    return result.astype(np.int64)


def mixed_key(*numbers: int) -> int:
    """One 64-bit number that depends on all of ``numbers`` and their order."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = _mix(key + np.uint64(number & WORD) + np.uint64(0x9E3779B97F4A7C15))
    return int(key[0])


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit of x changes half of the result's."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
