"""The GPU backend of the vector recurrences: what its kernels take. They are in ``triton_kernels.py``.

That file is imported when they run, since Triton takes a while.
"""

import torch
from torch import Tensor

from m2rnn.ops.backends.choice import why_not_on_device
from m2rnn.ops.vector_scan.problem import Gradients, Problem

WIDEST = 64  # V at most: W and gradients of W live in registers; half in float64


def why_not(problem: Problem) -> str | None:
    device = problem.device
    if (reason := why_not_on_device("triton", device)) is not None or device.type == "cpu":
        return reason
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is too old for Triton, which needs compute capability 8.0"
    widest = WIDEST // (problem.state_dtype.itemsize // 4)
    return f"V is {problem.units}, and the Triton kernels take up to {widest}" if problem.units > widest else None


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    from m2rnn.ops.vector_scan import triton_kernels

    return triton_kernels.forward(problem)


def backward(problem: Problem, y: Tensor, dy: Tensor, d_final: Tensor | None) -> Gradients:
    from m2rnn.ops.vector_scan import triton_kernels

    return triton_kernels.backward(problem, y, dy, d_final)
