"""What the CUDA backend needs no GPU for: its sources compile for every architecture it names, and its choices."""

import re
from dataclasses import replace

import pytest
import torch

from m2rnn.ops.backends.cuda import compiler
from m2rnn.ops.backends.cuda.gpu import Limits
from m2rnn.ops.scan.cuda import launch

pytest.importorskip("cuda.core", reason="cuda-core is not installed")
nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
try:
    nvrtc.nvrtcVersion()
except Exception as error:
    pytest.skip(f"NVRTC does not load: {error}", allow_module_level=True)

BFLOAT16 = launch._Variant(value_dim=16, warps=4, slots=1, dtype=torch.bfloat16, parts=1, clip=True)
AHEAD = replace(BFLOAT16, ahead=True, clip=False)
FLOAT16 = launch._Variant(value_dim=8, warps=1, slots=2, dtype=torch.float16, parts=2)
FLOAT32 = launch._Variant(value_dim=8, warps=1, slots=1, dtype=torch.float32, parts=3, clip=True)


@pytest.mark.parametrize(
    ("source", "variant", "capability"),
    [
        ("forward", BFLOAT16, (8, 0)),
        ("forward", FLOAT16, (9, 0)),
        ("forward", FLOAT32, (12, 0)),
        ("backward", BFLOAT16, (8, 0)),
        ("backward", FLOAT16, (12, 0)),
        ("backward", FLOAT32, (9, 0)),
        ("backward", AHEAD, (9, 0)),
    ],
)
def test_kernels_compile(
    source: str, variant: launch._Variant, capability: tuple[int, int], tmp_path, monkeypatch
) -> None:
    """With the shared memory that the launcher reserves, which the sources check."""
    monkeypatch.setenv("M2RNN_CACHE_DIR", str(tmp_path))
    code = compiler.cubin(source, variant.macros(source), capability)
    assert code.startswith(b"\x7fELF")
    assert f"m2rnn_{source}".encode() in code


def test_a_compiler_error_shows_its_message() -> None:
    with pytest.raises(Exception, match="nonsense"):
        compiler._compile("nonsense x;", {"arch": "sm_90", "define_macro": [("V", "16")]})


def test_rows_are_split_to_fit() -> None:
    """Groups of rows cover the state once, in whole tiles, each within the shared memory and threads of a block."""
    for limit in (99 << 10, 227 << 10):
        for dtype, parts in ((torch.bfloat16, 1), (torch.float16, 2), (torch.float32, 3)):
            for value_dim in (8, 16, 32, 64):
                for key_dim in (1, 16, 17, 64, 100, 256, 1000):

                    def variant(rows: int, value_dim=value_dim, dtype=dtype, parts=parts) -> launch._Variant:
                        return launch._Variant(value_dim, -(-rows // 16), 1, dtype, parts)

                    if variant(16).shared_bytes("backward") > limit:  # what why_not says
                        assert value_dim == 64
                        assert parts > 1
                        continue
                    groups = launch._row_groups(variant(key_dim), key_dim, limit)
                    assert [row for g in groups for row in range(g.start, g.stop)] == list(range(key_dim))
                    for g in groups:
                        assert g.start % 16 == 0
                        needed = variant(g.stop - g.start)
                        assert needed.shared_bytes("backward") <= limit, (limit, dtype, value_dim, key_dim)
                        assert needed.threads <= 512


def test_every_source_names_its_macros() -> None:
    """A macro that the launcher does not define would silently be 0 in an #if."""
    names = {name for name, _ in BFLOAT16.macros("forward")}
    for source in ("forward.cu", "backward.cu"):
        text = compiler.source_of(source)
        names |= set(re.findall(r"#define (\w+)", text))
        for condition in re.findall(r"#(?:el)?if (.*)", text):
            assert set(re.findall(r"[A-Z]\w+", condition)) <= names, condition


@pytest.mark.parametrize("steps", [1, 31, 128, 4096, 5000])
@pytest.mark.parametrize("step_bytes", [0, 1, 40_000, 10 << 20])
@pytest.mark.parametrize("slice_length", [96, 128, 10_000])
def test_windows_fit_and_are_even(steps: int, step_bytes: int, slice_length: int) -> None:
    window, length = launch._window(steps, step_bytes, slice_length, launch.PARTIAL_BYTES)
    if steps * step_bytes <= launch.PARTIAL_BYTES:
        assert window == steps
        return
    least = launch.CHUNK * step_bytes  # what one chunk takes has to fit
    assert 2 * window * step_bytes <= max(launch.PARTIAL_BYTES, 2 * least)
    assert window % length == 0
    assert length % launch.CHUNK == 0
    count = -(-steps // window)
    assert count * window - steps < window
    assert length == slice_length or window == length, "a slice is shortened only to fit into a window"


@pytest.mark.parametrize(
    ("units", "shared_heads", "slots", "together", "ahead"),
    [
        (84, 84, 1, 1, True),  # few heads: one a multiprocessor
        (2 * 84, 84, 1, 1, True),  # in turns, rather than two on some and one on others
        (4 * 84, 84, 2, 1, True),
        (4 * 132, 132, 2, 2, False),  # enough for 16 warps everywhere
        (8 * 84, 84, 2, 2, False),
        (8 * 84, 1, 1, 4, False),  # each head with a q and k of its own
    ],
)
def test_plan(units: int, shared_heads: int, slots: int, together: int, ahead: bool) -> None:
    plan = launch._plan(units, shared_heads, replace(BFLOAT16, slots=1), Limits(132, 228 << 10, 227 << 10))
    assert (plan.slots, plan.together, plan.ahead) == (slots, together, ahead)


def test_plan_of_a_small_gpu_fits() -> None:
    for warps, dtype, parts in ((4, torch.bfloat16, 1), (2, torch.float16, 2), (1, torch.float32, 3)):
        single = launch._Variant(16, warps, 1, dtype, parts)
        plan = launch._plan(1000, 8, single, Limits(20, 100 << 10, 99 << 10))
        assert plan.together * (plan.shared_bytes("backward") + 1024) <= 100 << 10
