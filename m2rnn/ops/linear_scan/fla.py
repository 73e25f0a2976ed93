"""The linear recurrences by the GPU kernels of flash-linear-attention, where they can run and are right."""

import importlib
import importlib.metadata
import importlib.util
import re
import subprocess

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_KEY = 256  #: rows of a state that the delta rule's kernels have room for
HOPPER = 9
#: Triton from the first to before the second computes wrong gradients in the gated chunk kernels on Hopper
WRONG_TRITON = (3, 4, 0), (3, 7, 1)
#: The first assembler in which NVIDIA names the faults with Hopper's asynchronous matrix products as mended
GOOD_PTXAS = (13, 3)
#: Of a block of the delta rule's last kernel; with more, its gradient of k is a race on Hopper
RIGHT_WARPS = 2


def why_not(device: torch.device, dtype: torch.dtype, key_dim: int, *, trained: bool, delta: bool) -> str | None:
    """Why the kernels cannot run, or None if they can.

    Args:
        device: Where the tensors are.
        dtype: Of q, k and v.
        key_dim: K.
        trained: Whether a gradient will be asked for.
        delta: The delta rule, or else gated linear attention.
    """
    if device.type != "cuda":
        return f"its kernels need a GPU, the tensors are on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels take bfloat16 or float16, not {str(dtype)[6:]}"
    if delta and key_dim > LARGEST_KEY:
        return f"its delta rule takes keys of up to {LARGEST_KEY} channels, not {key_dim}"
    if not _installed("fla"):
        return "flash-linear-attention is not installed: pip install 'm2rnn[fla]'"
    return _why_no_gradient(device, delta) if trained else None


def _why_no_gradient(device: torch.device, delta: bool) -> str | None:
    version = triton_version()
    if torch.cuda.get_device_capability(device)[0] != HOPPER or version < WRONG_TRITON[0]:
        return None
    triton, wrong = f"Triton {_dotted(version)}", "its gated chunk kernels compute wrong gradients on a Hopper GPU"
    newer = "upgrade to Triton 3.9 or newer"
    old_ptxas = ptxas_version() < GOOD_PTXAS
    assembler = (
        f"pip install 'nvidia-cuda-nvcc>={_dotted(GOOD_PTXAS)}' and set TRITON_PTXAS_PATH to its nvidia/cu13/bin/ptxas"
    )
    # its TileLang kernel has the delta rule alone
    if version < WRONG_TRITON[1] and not (delta and _installed("tilelang")):
        reason = f"with {triton} {wrong} (3.4.0 up to but without 3.7.1 do): {newer}"
        if delta:
            reason += ", or pip install tilelang, which needs nvcc" + (f", and {assembler}" if old_ptxas else "")
        return reason
    if old_ptxas:
        ptxas = f"ptxas {_dotted(ptxas_version())}" if any(ptxas_version()) else "a ptxas of unknown version"
        return f"with {triton} and its assembler, {ptxas}, {wrong} or fail: {newer}, or {assembler}"
    return None


@torch.compiler.assume_constant_result
def drop_wrong_configurations(device: torch.device) -> bool:
    """Take from fla's search for launch configurations those that compute wrong gradients; whether the GPU has such.

    On Hopper the last kernel of the delta rule's backward pass, with four warps, sometimes returns a gradient of k that
    is wrong by orders of magnitude (seen with Triton 3.7.1 and ptxas 13.5). fla keeps to two warps there for the rule
    without gates (its pull request 988), but not for this one.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != HOPPER:
        return False
    wy_fast = importlib.import_module("fla.ops.gated_delta_rule.wy_fast")
    tuner = wy_fast.prepare_wy_repr_bwd_kernel
    while not hasattr(tuner, "configs"):
        tuner = tuner.fn  # of Triton's heuristics around it
    tuner.configs = [config for config in tuner.configs if config.num_warps <= RIGHT_WARPS]
    tuner.cache = {key: config for key, config in tuner.cache.items() if config.num_warps <= RIGHT_WARPS}
    return True


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _installed(package: str) -> bool:
    return package in _PACKAGES


def triton_version() -> tuple[int, ...]:
    """Of the installed Triton, which PyTorch's builds for GPUs bring; (0, 0, 0) without one."""
    return _TRITON


def ptxas_version() -> tuple[int, ...]:
    """Of the assembler that Triton uses for Hopper GPUs; (0, 0) if nobody knows."""
    return _PTXAS


def _version_of(package: str) -> tuple[int, ...]:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return (0, 0, 0)
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _version_of_ptxas() -> tuple[int, ...]:
    try:
        from triton.backends.nvidia.compiler import get_ptxas_version

        found = re.search(r"release (\d+)\.(\d+)", get_ptxas_version(10 * HOPPER))
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError):
        found = None
    return tuple(map(int, found.groups())) if found else (0, 0)


# Looked up once, and not by a function with a cache, of which torch.compile would warn
_PACKAGES = frozenset(package for package in ("fla", "tilelang") if importlib.util.find_spec(package))
_TRITON = _version_of("triton")
_PTXAS = _version_of_ptxas() if "fla" in _PACKAGES else (0, 0)


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``gated_delta_scan`` for at least one token: y and the final states."""
    drop_wrong_configurations(q.device)
    writes = k.shape[2]
    k, v, beta = k.flatten(1, 2), v.flatten(1, 2), beta.to(q.dtype).flatten(1, 2)
    options = {
        "scale": 1.0,
        "initial_state": initial_state,
        "output_final_state": True,
        "cu_seqlens": cu_seqlens,  # as it is: by the tensor it remembers what the host has to wait for
    }
    if writes == 1:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        y, state = chunk_gated_delta_rule(q, k, v, log_decay, beta, **options)
    else:
        from fla.ops.gated_delta_product import chunk_gated_delta_product

        y, state = chunk_gated_delta_product(q, k, v, log_decay, beta, num_householder=writes, **options)
    return y, state


def gated_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``gated_linear_scan`` for at least one token: y and the final states."""
    from fla.ops.simple_gla import chunk_simple_gla

    keys, values = k.shape[-1], v.shape[-1]
    odd_key, odd_value = keys % 2, values % 2  # its gradient wants even numbers of channels
    q, k = (F.pad(x.repeat_interleave(v.shape[2] // x.shape[2], 2), (0, odd_key)) for x in (q, k))
    if initial_state is not None:
        initial_state = F.pad(initial_state, (0, odd_value, 0, odd_key))
    y, state = chunk_simple_gla(
        q,
        k,
        F.pad(v, (0, odd_value)),
        log_decay,
        scale=1.0,
        initial_state=initial_state,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    return y[..., :values], state[..., :keys, :values]
