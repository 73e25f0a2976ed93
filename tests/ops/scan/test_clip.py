"""The clamp on the state's gradient where it begins to act: a gradient that grows until it meets the limit."""

import pytest
import torch

from m2rnn.ops import m2rnn_scan
from m2rnn.ops.scan import reference
from tests.tolerances import assert_close

BATCH, HEADS, KEY = 2, 2, 20


def _hadamard(size: int) -> torch.Tensor:
    """A rotation that takes a row with one number to a row of equal numbers, and back."""
    rotation = torch.ones(1, 1)
    while len(rotation) < size:
        rotation = torch.kron(rotation, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) / 2**0.5
    return rotation


# Once some numbers are clamped, the errors of the others still grow: with a gain of 2, 2^8 times within 8 steps, when
# the plain loop in float32 is off by 4e-5: it takes fewer steps. Kernels in bfloat16 bound the growth over 8 steps.
@pytest.mark.parametrize(
    ("gain", "dtype", "longest"),
    [(1.3, torch.bfloat16, 8), (2.0, torch.bfloat16, 8), (1.3, torch.float32, 8), (2.0, torch.float32, 6)],
)
@pytest.mark.parametrize("value", [8, 16, 32])
def test_a_growing_gradient_is_clamped_in_time(
    gain: float, value: int, dtype: torch.dtype, longest: int, backend: str, device: str
) -> None:
    """With f = 0, H = 0, since k = 0, and W a rotation times ``gain``, a step takes the norm times ``gain``."""
    if backend == "reference":
        pytest.skip("this is what the others are compared with")
    weight = (gain * _hadamard(value)).bfloat16().float()  # else its rounding would add up
    inputs = {
        "q": torch.randn(BATCH, 41, 1, KEY).to(dtype),
        "k": torch.zeros(BATCH, 41, 1, KEY, dtype=dtype),
        "v": torch.randn(BATCH, 41, HEADS, value).to(dtype),
        "f": torch.zeros(BATCH, 41, HEADS),
        "weight": weight.expand(HEADS, -1, -1),
        "initial_state": torch.zeros(BATCH, HEADS, KEY, value),
    }
    dy = 1e-5 * torch.randn(BATCH, 41, HEADS, value).to(dtype)
    d_state = torch.nn.functional.one_hot(torch.randint(value, (BATCH, HEADS, KEY)), value).float()
    d_state[:, :, ::2] = value**-0.5
    before = 32  # steps; bfloat16 problems of no more than that are computed in float32
    for after in range(1, longest + 1):  # kernels look at 8 steps at a time
        x = {name: t[:, : before + after] if t.shape[1] == 41 else t for name, t in inputs.items()}
        cotangents = (dy[:, : before + after], d_state)
        limit = 0.7 * gain**before
        truth = [t.double() for t in (*cotangents, *x.values())]
        expected = reference.scan_backward(*truth, state_clip=limit)
        assert not torch.allclose(expected[5], reference.scan_backward(*truth)[5], rtol=0.1), "never reached"

        leaves = {name: t.to(device).requires_grad_() for name, t in x.items()}
        outputs = m2rnn_scan(**leaves, output_final_state=True, state_clip=limit, backend=backend)
        gradients = torch.autograd.grad(outputs, list(leaves.values()), [t.to(device) for t in cotangents])
        for name, gradient, reference_gradient in zip(leaves, gradients, expected, strict=True):
            assert_close(gradient, reference_gradient, dtype, "gradient", f"{name}, {before} steps, then {after}")
