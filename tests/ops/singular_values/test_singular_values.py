"""``bounded`` cuts singular values and changes nothing else: products and kernel against NumPy's decomposition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from m2rnn.ops.singular_values.operator import bounded
from tests.ops.ahead_of_time import compile_kernels
from tests.ops.triton_runs import GPU, runs_triton
from tests.tolerances import relative_error

ERRORS = {torch.float64: 1e-12, torch.float32: 1e-6}
COMPILE = """
import torch
from m2rnn.ops.singular_values import triton as singular_values_triton

capability = 90
for dtype in (torch.float32, torch.bfloat16):
    for width in (5, 16):
        singular_values_triton.bounded_by_kernel(torch.empty(3, width, width, dtype=dtype), 0.9)
for kernel in kernels:
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared < 2**16
assert len(kernels) == 4
"""


def by_kernel(weight: Tensor, bound: Tensor | float) -> Tensor:
    from m2rnn.ops.singular_values.triton import bounded_by_kernel

    return bounded_by_kernel(
        weight.cuda() if GPU else weight, bound.cuda() if GPU and torch.is_tensor(bound) else bound
    )


WAYS = {"products": bounded, "kernel": by_kernel}
ways = pytest.mark.parametrize("way", ["products", pytest.param("kernel", marks=runs_triton)])


def matrices(width: int, scale: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(6, width, width, generator=generator, dtype=torch.float64) * scale * width**-0.5
    weight[0], weight[1], weight[2] = torch.eye(width), 0.9 * torch.eye(width), 0
    return weight.to(dtype)


def by_decomposition(weight: Tensor, bound: np.ndarray) -> Tensor:
    left, values, right = np.linalg.svd(weight.double().numpy())
    return torch.from_numpy(left * np.minimum(values, bound[:, None])[:, None] @ right)


@ways
@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("scale", [0.3, 1, 100])
@pytest.mark.parametrize("width", [3, 16])
def test_singular_values_are_cut_at_the_bound_of_each_matrix(
    way: str, width: int, scale: float, dtype: torch.dtype
) -> None:
    weight = matrices(width, scale, dtype)
    bounds = torch.tensor([0.9, 0.9, 0.5, 1.3, 0.02, 0.9])
    found = WAYS[way](weight, bounds)
    assert found.dtype == dtype
    assert relative_error(found, by_decomposition(weight, bounds.double().numpy())) < ERRORS[dtype]
    excess = torch.linalg.matrix_norm(found.double().cpu(), 2) / bounds - 1
    assert excess.max() < 1e-7


@ways
def test_wide_matrices_too_which_the_kernel_leaves_to_products(way: str) -> None:
    weight = matrices(32 if way == "products" else 16, 2, torch.float32)
    assert relative_error(WAYS[way](weight, 0.9), by_decomposition(weight, np.full(6, 0.9))) < 1e-6


@ways
def test_a_matrix_within_the_bound_keeps_its_bits(way: str) -> None:
    weight = matrices(16, 0.3, torch.float32)
    bounds = torch.tensor([1.0, 0.95, 0.1, 2.0, 2.0, float("inf")])
    assert torch.equal(WAYS[way](weight, bounds).cpu(), weight)


@runs_triton
def test_the_kernel_compiles_ahead_of_time(tmp_path: Path) -> None:
    compile_kernels(COMPILE, tmp_path)


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_the_host_does_not_wait_and_launches_one_kernel() -> None:
    weight = matrices(16, 2, torch.float32).cuda()
    bounds = torch.full((6,), 0.9, device="cuda")
    bounded(weight, bounds)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            bounded(weight, bounds)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kernels = [event.name for event in profile.events() if "_cut" in event.name]
    assert len(kernels) == 1
