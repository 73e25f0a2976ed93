"""Which backend runs: chosen by device, dtype and shape, with one warning where it is not the fastest."""

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from m2rnn.ops.backends import choice
from m2rnn.ops.backends.cuda.gpu import gpus
from m2rnn.ops.scan import triton
from m2rnn.ops.scan.problem import BACKENDS, Problem
from m2rnn.ops.vector_scan import problem as vector
from m2rnn.ops.vector_scan import triton as vector_triton

GPU = SimpleNamespace(
    name="GPU X",
    major=9,
    minor=0,
    multi_processor_count=132,
    shared_memory_per_multiprocessor=228 << 10,
    shared_memory_per_block_optin=227 << 10,
)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    caches = (choice.why_unavailable, choice._warn_fallback, triton._limit)
    for cached in caches:
        cached.cache_clear()
    with patch.dict(gpus, clear=True):
        yield
    for cached in caches:
        cached.cache_clear()


def _resolve(
    device: str, backend: str | None = None, *, value: int = 16, steps: int = 5, dtype: torch.dtype = torch.bfloat16
) -> str:
    shape = 1, steps, 2, value
    x: Any = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=shape)
    return BACKENDS.choose(backend, Problem(x, x, x, x, x))


def _only(monkeypatch: pytest.MonkeyPatch, *available: str, gpu: Any = GPU) -> None:
    """A machine on which these backends can run."""
    monkeypatch.setattr(choice, "why_unavailable", lambda name: None if name in available else f"no {name} here")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)


def test_cpu_tensors_take_the_cpu_kernels_and_meta_tensors_the_reference() -> None:
    assert _resolve("cpu") == "cpu"
    assert _resolve("meta") == "reference"


@pytest.mark.parametrize(
    ("available", "expected", "words"),
    [
        (("reference", "triton", "cuda"), "cuda", None),
        (("reference", "triton"), "triton", "its triton kernels.*no cuda here"),
        (("reference",), "reference", "slow reference loop.*no cuda here; no triton here"),
    ],
)
def test_gpu_tensors_take_the_fastest_that_runs_and_warn_once(
    available: tuple[str, ...], expected: str, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _only(monkeypatch, *available)
    if words is not None:
        with pytest.warns(UserWarning, match=words):
            assert _resolve("cuda") == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _resolve("cuda") == expected


@pytest.mark.parametrize(
    ("value", "dtype", "gpu", "words"),
    [
        (129, torch.bfloat16, {}, "V is 129.*up to 128 on GPU X"),
        (65, torch.float64, {}, "V is 65.*up to 64 .*float64"),
        (65, torch.float32, {"shared_memory_per_block_optin": 99 << 10}, "V is 65.*up to 64"),
        (16, torch.float32, {"major": 7, "minor": 5}, "capability 7.5"),
    ],
)
def test_triton_says_what_it_has_no_room_for(
    value: int, dtype: torch.dtype, gpu: dict[str, int], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _only(monkeypatch, "reference", "triton", gpu=SimpleNamespace(**{**vars(GPU), **gpu}))
    with pytest.raises(ValueError, match=words):
        _resolve("cuda", "triton", value=value, dtype=dtype)
    with pytest.warns(UserWarning, match=words):
        assert _resolve("cuda", value=value, dtype=dtype) == "reference"


def test_the_widest_that_there_is_room_for_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    _only(monkeypatch, "reference", "triton")
    assert _resolve("cuda", "triton", value=128) == "triton"
    assert _resolve("cuda", "triton", value=64, dtype=torch.float64) == "triton"


def test_wide_heads_and_single_tokens_in_16_bits_take_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """For which it is the faster of the two: so there is no warning."""
    _only(monkeypatch, "reference", "triton", "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _resolve("cuda", value=33) == "triton"
        assert _resolve("cuda", value=32) == "cuda"
        assert _resolve("cuda", value=33, dtype=torch.float32) == "cuda"
        assert _resolve("cuda", steps=1) == "triton"
        assert _resolve("cuda", steps=1, dtype=torch.float32) == "cuda"


def test_cpu_tensors_are_interpreted_only_if_triton_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    assert _resolve("cpu", "triton") == "triton"
    assert _resolve("cpu") == "cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    choice.why_unavailable.cache_clear()
    with pytest.raises(ValueError, match=r"no GPU that PyTorch can use|the tensors are on cpu"):
        _resolve("cpu", "triton")


def test_triton_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed: pip install triton"):
        _resolve("cuda", "triton")


@pytest.mark.parametrize(("units", "dtype"), [(64, torch.float32), (32, torch.float64)])
def test_vector_recurrences_take_triton_as_far_as_its_registers_reach(
    units: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for more, reason in ((0, None), (1, f"V is {units + 1}, and the Triton kernels take up to {units}")):
        x: Any = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 5, 2, units + more))
        assert vector_triton.why_not(vector.Problem([x], [x])) == reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    assert (
        vector_triton.why_not(vector.Problem([x], [x]))
        == "GPU X is too old for Triton, which needs compute capability 8.0"
    )
