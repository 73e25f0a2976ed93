"""The CUDA kernels cut time into slices and windows where a problem is large; here small ones are cut."""

import pytest
import torch

from m2rnn.ops.scan.cuda import launch
from tests.ops.cases import Case, check, make_problem, run, truth

CASES = [
    Case(batch=3, time=200, heads=(1, 1, 6, 6, 6), key=64, value=16, clip=0.1, dtype=torch.bfloat16),
    Case(batch=2, time=97, heads=(1, 2, 4, 4, 2), key=20, value=32, dtype=torch.float32),
    Case(lengths=(150, 3, 0, 100, 64), heads=(1, 1, 4, 4, 4), key=64, value=16, clip=0.1, dtype=torch.bfloat16),
    Case(lengths=(40,) * 5 + (1, 70), heads=(2, 1, 4, 4, 4), key=33, value=8, clip=1.0, dtype=torch.float16),
]


@pytest.mark.parametrize("partial_bytes", [1, 1 << 29], ids=["many windows", "one window"])
@pytest.mark.parametrize("dweight_bytes", [1, launch.DWEIGHT_BYTES], ids=["one lane", "lanes"])
@pytest.mark.parametrize("length", [32, 64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_slices_and_windows_match_float64(
    case: Case,
    length: int,
    dweight_bytes: int,
    partial_bytes: int,
    backend: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend != "cuda":
        pytest.skip("only the CUDA kernels have slices")
    monkeypatch.setattr(launch, "_slices", lambda *problem: length)
    monkeypatch.setattr(launch, "PARTIAL_BYTES", partial_bytes)
    monkeypatch.setattr(launch, "PACKED_PARTIAL_BYTES", partial_bytes)
    monkeypatch.setattr(launch, "DWEIGHT_BYTES", dweight_bytes)
    results = run(make_problem(case, device=device), backend)
    check(results, truth(case), case)
    again = run(make_problem(case, device=device), backend)
    assert all(torch.equal(x, again[name]) for name, x in results.items())


@pytest.mark.parametrize("sequences", [1, 4, 8, 19, 64, 1000])
@pytest.mark.parametrize("steps", [0, 1, 1000, 4097, 32_768, 1_000_000])
def test_slices_cover_the_time(steps: int, sequences: int) -> None:
    heads, mean = 84, steps // sequences
    for shortest in (launch.FORWARD_SLICE, launch.BACKWARD_SLICE):
        length = launch._slices(sequences * heads, 2, steps, mean, shortest, 132)
        assert length % launch.CHUNK == 0
        slices = max(-(-steps // length), 1)
        assert slices <= 256, "each sequence has a block for each slice of the whole time, most of them idle"
        assert slices == 1 or length >= shortest
