"""The CPU kernels' own tanh: within 2 ulp of the true value over every binade of float32."""

from collections.abc import Iterator

import numpy as np
import pytest

from m2rnn.ops import available_backends

if available_backends().get("cpu", "not there") is not None:
    pytest.skip(f"cpu: {available_backends().get('cpu')}", allow_module_level=True)

from m2rnn.ops.scan.cpu import tanh

ULP = 2.0
BLOCK = 1 << 22


def _worst(bits: np.ndarray) -> tuple[float, float]:
    """Largest error in ulp over the float32 of these bit patterns that are numbers, and where."""
    x = bits.view(np.float32)
    x = x[~np.isnan(x)]
    if not x.size:
        return 0.0, 0.0
    true = np.tanh(x.astype(np.float64))
    got = tanh(x)
    assert got.dtype == np.float32
    assert not np.isnan(got).any(), f"tanh({x[np.isnan(got)][0]!r}) is NaN"
    error = np.abs(got - true) / np.spacing(np.abs(true).astype(np.float32)).astype(np.float64)
    worst = int(error.argmax())
    return float(error[worst]), float(x[worst])


def _check(blocks: Iterator[np.ndarray]) -> None:
    error, where = max(map(_worst, blocks))
    assert error <= ULP, f"tanh({where!r}) is {error:.2f} ulp off: {tanh(np.float32([where]))[0]!r}"


def test_error_over_all_binades() -> None:
    """One float32 in 509, a prime, of all there are: about 33,000 in every binade, both signs."""
    _check(iter(np.array_split(np.arange(0, 1 << 32, 509, dtype=np.uint64).astype(np.uint32), 4)))


def test_error_where_formulas_change() -> None:
    """Every float32 for a stretch around each power of two where an implementation may change its formula."""
    centres = [
        2.0**-12,
        2.0**-6,
        0.125,
        0.25,
        0.5,
        0.549,
        0.5493061,
        0.625,
        1.0,
        2.0,
        4.0,
        8.0,
        9.0,
        9.0108,
        10.0,
    ]
    around = np.arange(-(1 << 14), 1 << 14, dtype=np.int64)
    bits = np.concatenate([np.float32(c).view(np.uint32).astype(np.int64) + around for c in centres])
    _check(iter([bits.astype(np.uint32), (bits + (1 << 31)).astype(np.uint32)]))


def test_every_float32(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--exhaustive"):
        pytest.skip("minutes long: needs --exhaustive")
    _check(np.arange(start, start + BLOCK, dtype=np.uint64).astype(np.uint32) for start in range(0, 1 << 32, BLOCK))


def test_special_values() -> None:
    tiny = np.float32(1e-45)
    x = np.float32([0.0, -0.0, np.inf, -np.inf, tiny, -tiny, 1.1754944e-38, 3.4e38, -3.4e38])
    expected = np.float32([0.0, -0.0, 1.0, -1.0, tiny, -tiny, 1.1754944e-38, 1.0, -1.0])
    got = tanh(x)
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


def test_nan_of_either_sign_and_payload_stays_nan() -> None:
    bits = np.array([0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001], np.uint32)
    assert np.isnan(tanh(bits.view(np.float32))).all()


def test_odd_and_bounded() -> None:
    """Exactly: tanh(-x) = -tanh(x) and |tanh(x)| ≤ 1, which the backward pass's 1 - Z² relies on."""
    x = np.arange(0, 0x7F800000, 1021, dtype=np.uint32).view(np.float32)
    positive = tanh(x)
    np.testing.assert_array_equal(tanh(-x).view(np.uint32), (-positive).view(np.uint32))
    assert positive.max() == 1.0
    assert positive.min() == 0.0


@pytest.mark.parametrize("size", [0, 1, 3, 7, 8, 9, 31])
def test_any_length_and_position_in_the_vector(size: int) -> None:
    """An element's result does not depend on its neighbours or its lane."""
    x = np.linspace(-3, 3, 31, dtype=np.float32)
    np.testing.assert_array_equal(tanh(x[:size].copy()), tanh(x)[:size])


def test_float64() -> None:
    """The same for float64, in units that float64 tests rest on."""
    x = np.concatenate([np.linspace(-25, 25, 200_001), np.logspace(-300, 2, 50_001), [np.inf, -np.inf, 0.0]])
    got, true = tanh(x), np.tanh(x)
    assert got.dtype == np.float64
    assert (np.abs(got - true) <= 4 * np.spacing(np.abs(true))).all()
    assert np.isnan(tanh(np.array([np.nan]))).all()
