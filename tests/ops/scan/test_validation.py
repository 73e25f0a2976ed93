"""Bad input is a ValueError that names the argument, what it was, and what was expected."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from m2rnn.ops import available_backends, m2rnn_scan, m2rnn_step

B, T, K, V = 2, 5, 3, 4


def _arguments(**changes: Any) -> dict[str, Any]:
    """A good call: q 1 head, k 2, v 4, f 4, weight 2."""
    arguments: dict[str, Any] = {
        "q": torch.randn(B, T, 1, K),
        "k": torch.randn(B, T, 2, K),
        "v": torch.randn(B, T, 4, V),
        "f": torch.rand(B, T, 4),
        "weight": torch.randn(2, V, V),
    }
    return {**arguments, **changes}


def _packed(**changes: Any) -> dict[str, Any]:
    arguments = {name: x if name == "weight" else x[:1] for name, x in _arguments().items()}
    return {**arguments, "cu_seqlens": torch.tensor([0, 2, 5]), **changes}


def _bounds(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# what is wrong -> (arguments, words the message must have: the argument, its value or shape, the expectation)
BAD: dict[str, tuple[Callable[[], dict[str, Any]], list[str]]] = {
    "q of three dimensions": (lambda: _arguments(q=torch.randn(B, T, K)), ["q", "2, 5, 3"]),
    "k of five dimensions": (lambda: _arguments(k=torch.randn(B, T, 2, K, 1)), ["k", "2, 5, 2, 3, 1"]),
    "v of three dimensions": (lambda: _arguments(v=torch.randn(B, T, V)), ["v", "2, 5, 4"]),
    "f of four dimensions": (lambda: _arguments(f=torch.rand(B, T, 4, 1)), ["f", "2, 5, 4, 1"]),
    "weight of two dimensions": (lambda: _arguments(weight=torch.randn(V, V)), ["weight", "4, 4"]),
    "weight not square": (lambda: _arguments(weight=torch.randn(2, V, V + 1)), ["weight", "2, 4, 5"]),
    "weight of other width than v": (
        lambda: _arguments(weight=torch.randn(2, 6, 6)),
        ["weight", "2, 6, 6", "4"],
    ),
    "batch of k differs": (lambda: _arguments(k=torch.randn(B + 1, T, 2, K)), ["k", "3, 5, 2, 3", "2"]),
    "batch of 1 is not broadcast": (lambda: _arguments(f=torch.rand(1, T, 4)), ["f", "1, 5, 4", "2"]),
    "time of v differs": (lambda: _arguments(v=torch.randn(B, T + 1, 4, V)), ["v", "2, 6, 4, 4", "5"]),
    "time of f differs": (lambda: _arguments(f=torch.rand(B, T - 1, 4)), ["f", "2, 4, 4", "5"]),
    "key channels of k differ from q": (
        lambda: _arguments(k=torch.randn(B, T, 2, K + 2)),
        ["k", "2, 5, 2, 5", "3"],
    ),
    "heads of k do not divide": (
        lambda: _arguments(k=torch.randn(B, T, 3, K)),
        ["k", "2, 5, 3, 3", "4", "divi"],
    ),
    "heads of weight do not divide": (
        lambda: _arguments(weight=torch.randn(3, V, V)),
        ["weight", "3, 4, 4", "divi"],
    ),
    "no heads": (lambda: _arguments(q=torch.randn(B, T, 0, K)), ["q", "2, 5, 0, 3"]),
    "no key channels": (
        lambda: _arguments(q=torch.randn(B, T, 1, 0), k=torch.randn(B, T, 2, 0)),
        ["q", "2, 5, 1, 0"],
    ),
    "no value channels": (
        lambda: _arguments(v=torch.randn(B, T, 4, 0), weight=torch.randn(2, 0, 0)),
        ["v", "2, 5, 4, 0"],
    ),
    "q of integers": (
        lambda: _arguments(q=torch.ones(B, T, 1, K, dtype=torch.int64)),
        ["q", "int64", "float"],
    ),
    "v complex": (lambda: _arguments(v=torch.randn(B, T, 4, V, dtype=torch.complex64)), ["v", "complex64"]),
    "weight of booleans": (lambda: _arguments(weight=torch.ones(2, V, V) > 0), ["weight", "bool"]),
    "k is no tensor": (lambda: _arguments(k=[[1.0]]), ["k", "list"]),
    "f elsewhere": (lambda: _arguments(f=torch.rand(B, T, 4, device="meta")), ["f", "meta", "cpu"]),
    "initial state of too few sequences": (
        lambda: _arguments(initial_state=torch.randn(1, 4, K, V)),
        ["initial_state", "1, 4, 3, 4", "2, 4, 3, 4"],
    ),
    "initial state with the heads of q": (
        lambda: _arguments(initial_state=torch.randn(B, 1, K, V)),
        ["initial_state", "2, 1, 3, 4", "2, 4, 3, 4"],
    ),
    "initial state transposed": (
        lambda: _arguments(initial_state=torch.randn(B, 4, V, K)),
        ["initial_state", "2, 4, 4, 3", "2, 4, 3, 4"],
    ),
    "initial state of integers": (
        lambda: _arguments(initial_state=torch.zeros(B, 4, K, V, dtype=torch.int32)),
        ["initial_state", "int32"],
    ),
    "packed with a batch": (
        lambda: _arguments(cu_seqlens=_bounds(0, 2, 5)),
        ["cu_seqlens", "2, 5, 1, 3"],
    ),
    "packed initial state of the batch": (
        lambda: _packed(initial_state=torch.randn(1, 4, K, V)),
        ["initial_state", "1, 4, 3, 4", "2, 4, 3, 4"],
    ),
    "cu_seqlens of two dimensions": (
        lambda: _packed(cu_seqlens=_bounds(0, 2, 5)[None]),
        ["cu_seqlens", "1, 3"],
    ),
    "cu_seqlens of floats": (
        lambda: _packed(cu_seqlens=torch.tensor([0.0, 5.0])),
        ["cu_seqlens", "float32", "int"],
    ),
    "cu_seqlens of int16": (
        lambda: _packed(cu_seqlens=_bounds(0, 5, dtype=torch.int16)),
        ["cu_seqlens", "int16"],
    ),
    "cu_seqlens elsewhere": (
        lambda: _packed(cu_seqlens=_bounds(0, 2, 5).to("meta")),
        ["cu_seqlens", "meta", "cpu"],
    ),
    "cu_seqlens empty": (lambda: _packed(cu_seqlens=_bounds()), ["cu_seqlens", "0"]),
    "cu_seqlens does not start at 0": (lambda: _packed(cu_seqlens=_bounds(1, 5)), ["cu_seqlens", "1", "0"]),
    "cu_seqlens ends early": (lambda: _packed(cu_seqlens=_bounds(0, 4)), ["cu_seqlens", "4", "5"]),
    "cu_seqlens ends late": (lambda: _packed(cu_seqlens=_bounds(0, 6)), ["cu_seqlens", "6", "5"]),
    "cu_seqlens decreases": (
        lambda: _packed(cu_seqlens=_bounds(0, 4, 2, 5)),
        ["cu_seqlens", "0, 4, 2, 5", "5"],
    ),
    "cu_seqlens a list": (lambda: _packed(cu_seqlens=[0, 5]), ["cu_seqlens", "list", "tensor"]),
    "clip zero": (lambda: _arguments(state_clip=0.0), ["state_clip", "0.0", "positive"]),
    "clip negative": (lambda: _arguments(state_clip=-1.0), ["state_clip", "-1"]),
    "clip NaN": (lambda: _arguments(state_clip=float("nan")), ["state_clip", "nan"]),
    "clip a string": (lambda: _arguments(state_clip="1"), ["state_clip", "'1'", "number"]),
    "unknown backend": (lambda: _arguments(backend="fast"), ["backend", "fast", "reference", "cpu"]),
}


@pytest.mark.parametrize("what", BAD)
def test_scan_rejects(what: str) -> None:
    make, words = BAD[what]
    with pytest.raises(ValueError, match=words[0]) as caught:
        m2rnn_scan(**make())
    message = str(caught.value)
    assert re.search(rf"\b{words[0]}\b", message), f"{words[0]} is not named in: {message}"
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def test_good_arguments_pass() -> None:
    """Else the table above would prove nothing."""
    for good in (_arguments(), _packed(), _arguments(state_clip=1.0), _arguments(state_clip=2)):
        y, _ = m2rnn_scan(**good)
        assert y.isfinite().all()


def _step_arguments(**changes: Any) -> list[Any]:
    good = {name: x if name == "weight" else x[:, 0] for name, x in _arguments().items()}
    return list({**good, "state": torch.randn(B, 4, K, V), **changes}.values())


BAD_STEP: dict[str, tuple[Callable[[], list[Any]], list[str]]] = {
    "q with a time dimension": (lambda: _step_arguments(q=torch.randn(B, 1, 1, K)), ["q", "2, 1, 1, 3"]),
    "f of one dimension": (lambda: _step_arguments(f=torch.rand(B)), ["f", "2"]),
    "batch of v": (lambda: _step_arguments(v=torch.randn(3, 4, V)), ["v", "3, 4, 4"]),
    "heads of k": (lambda: _step_arguments(k=torch.randn(B, 3, K)), ["k", "2, 3, 3", "divi"]),
    "state with the heads of q": (
        lambda: _step_arguments(state=torch.randn(B, 1, K, V)),
        ["state", "2, 1, 3, 4"],
    ),
    "state of another batch": (
        lambda: _step_arguments(state=torch.randn(1, 4, K, V)),
        ["state", "1, 4, 3, 4"],
    ),
    "no state": (lambda: _step_arguments(state=None), ["state", "NoneType"]),
    "weight not square": (lambda: _step_arguments(weight=torch.randn(2, V, 5)), ["weight", "2, 4, 5"]),
}


@pytest.mark.parametrize("what", BAD_STEP)
def test_step_rejects(what: str) -> None:
    make, words = BAD_STEP[what]
    with pytest.raises(ValueError, match=words[0]) as caught:
        m2rnn_step(*make())
    message = str(caught.value)
    assert re.search(rf"\b{words[0]}\b", message), f"{words[0]} is not named in: {message}"
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    m2rnn_step(*_step_arguments())


def test_a_backend_that_cannot_run_says_why() -> None:
    """Asked for by name, it is an error with the reason that available_backends() gives."""
    missing = {name: reason for name, reason in available_backends().items() if reason is not None}
    if not missing:
        pytest.skip("every backend runs here")
    for name, reason in missing.items():
        with pytest.raises(ValueError, match=name) as caught:
            m2rnn_scan(**_arguments(backend=name))
        assert reason in str(caught.value)


def test_nothing_is_computed_from_bad_arguments() -> None:
    """The check comes before the kernels: no shape of these reads out of bounds or warns."""
    with pytest.raises(ValueError, match="cu_seqlens"):
        m2rnn_scan(**_packed(cu_seqlens=_bounds(0, 1 << 40)))
    with pytest.raises(ValueError, match="cu_seqlens"):
        m2rnn_scan(**_packed(cu_seqlens=_bounds(0, -5, 5)))
