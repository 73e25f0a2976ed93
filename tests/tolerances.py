"""The one table of tolerances, and the one comparison that every test uses.

The error of x is ‖x − ref‖ / ‖ref‖, where ref was computed in float64 from the same inputs, after they were
rounded to the dtype under test. The table holds for sequences of up to 4096 steps.
"""

import math

import torch
from torch import Tensor

#: dtype of the coarsest input -> kind of result -> largest relative error
TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"output": 1e-12, "state": 1e-12, "gradient": 1e-12},
    torch.float32: {"output": 1e-5, "state": 1e-5, "gradient": 5e-5},
    torch.bfloat16: {"output": 6e-3, "state": 6e-3, "gradient": 2.5e-2},
    torch.float16: {"output": 2e-3, "state": 2e-3, "gradient": 5e-3},
}


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """‖actual − reference‖ / ‖reference‖ in float64; infinite if anything is not finite, 0 if both are 0."""
    x, ref = actual.detach().double().cpu(), reference.detach().double().cpu()
    error, norm = (x - ref).norm().item(), ref.norm().item()
    if not math.isfinite(error) or not math.isfinite(norm):
        return math.inf
    if norm == 0:
        return 0.0 if error == 0 else math.inf
    return error / norm


def assert_close(actual: Tensor, reference: Tensor, dtype: torch.dtype, kind: str, name: str = "result") -> None:
    """``actual`` is ``reference`` to the table's tolerance for a ``kind`` of result from ``dtype``."""
    __tracebackhide__ = True
    tolerance = TOLERANCES[dtype][kind]
    if actual.shape != reference.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, the reference has {tuple(reference.shape)}")
    error = relative_error(actual, reference)
    if error <= tolerance:  # false for NaN
        return
    x, ref = actual.detach().double().cpu(), reference.detach().double().cpu()
    difference = (x - ref).abs().nan_to_num(nan=math.inf)
    worst = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    raise AssertionError(
        f"{name}: relative error {error:.3g} over the {kind} tolerance {tolerance:g} of {str(dtype)[6:]} "
        f"(×{error / tolerance:.3g}), shape {tuple(x.shape)}; "
        f"worst at {worst}: {x[worst]:.9g}, reference {ref[worst]:.9g}; "
        f"not finite: {int((~x.isfinite()).sum())}, in the reference {int((~ref.isfinite()).sum())}; "
        f"norm {x.norm():.6g}, reference {ref.norm():.6g}"
    )
