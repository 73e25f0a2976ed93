"""The portable GPU backend as a backend: what its kernels take and save. They are in ``triton_kernels.py``.

That file is imported when they run, since Triton takes a while.
"""

from functools import lru_cache

import torch
from torch import Tensor

from m2rnn.ops.backends.choice import why_not_on_device
from m2rnn.ops.scan.problem import Gradients, Problem, states_between_chunks

CHUNK = 64  #: steps between saved states


def why_not(problem: Problem) -> str | None:
    if (reason := why_not_on_device("triton", problem.device)) is not None or problem.device.type == "cpu":
        return reason
    widest, why = _limit(problem.device, problem.state_dtype)
    return f"V is {problem.value_dim}, {why}" if problem.value_dim > widest else None


@lru_cache
def _limit(device: torch.device, dtype: torch.dtype) -> tuple[int, str]:
    """The largest V that the kernels take on a GPU, whose chip has to hold W and its gradient, and why."""
    gpu = torch.cuda.get_device_properties(device)
    if torch.version.hip is None and gpu.major < 8:
        return 0, f"and {gpu.name} has compute capability {gpu.major}.{gpu.minor}: Triton needs 8.0"
    roomy = dtype == torch.float32 and getattr(gpu, "shared_memory_per_block_optin", 0) >= 160 << 10
    widest = 128 if roomy else 64
    return widest, f"and the Triton kernels take up to {widest} on {gpu.name} with a {str(dtype)[6:]} state"


def saved_like(problem: Problem) -> Tensor:
    """States [n, H, K, V], where ``backward`` starts its chunks; packed sequences leave some of them unused: zeros."""
    packed = problem.cu_seqlens is not None
    count = problem.steps // CHUNK if packed else states_between_chunks(problem.batch, problem.steps, CHUNK)
    saved = problem.new_states(count)
    return saved.zero_() if packed else saved


def forward(problem: Problem, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    from m2rnn.ops.scan import triton_kernels

    return triton_kernels.forward(problem, saved_like(problem) if save else None)


def backward(problem: Problem, saved: Tensor, dy: Tensor, d_final: Tensor | None) -> Gradients:
    from m2rnn.ops.scan import triton_kernels

    return triton_kernels.backward(problem, saved, dy, d_final)
