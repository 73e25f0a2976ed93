"""Launches of the kernels for decoding: one token of a layer between its projections, and a projection of few rows."""

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from m2rnn.ops.backends import cuda
from m2rnn.ops.backends.cuda.compiler import cubin
from m2rnn.ops.backends.cuda.driver import Kernel
from m2rnn.ops.decode.token import Token

_DTYPES = {torch.bfloat16: (0, 1), torch.float16: (1, 2), torch.float32: (2, 3)}  # INPUT and PARTS
_VALUE_DIMS = (8, 16, 32, 64)
_WIDEST_CONVOLUTION = 8
_LATENCY_BYTES = 16 << 20  # of states below which waiting counts more than bandwidth
_LINEAR_WARPS = 4


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("row", "state", "new_state", "conv", "new_conv")),
        *((name, ctypes.c_void_p) for name in ("conv_weight", "conv_bias", "weight", "A_log", "dt_bias", "D", "norm")),
        ("y", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("heads", "key_dim", "block_heads", "silu", "prefetch")),
        *((f"{name}_heads", ctypes.c_int32) for name in ("q", "k", "v", "f", "g", "weight")),
        *((f"{name}_ratio", ctypes.c_float) for name in ("q", "k", "v", "f", "g", "weight")),
    )


class _Linear(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "y")),
        *((name, ctypes.c_int32) for name in ("channels", "columns")),
    )


@dataclass(frozen=True)
class _Heads:
    """How many heads there are of everything, and their sizes."""

    all: int
    q: int
    k: int
    v: int
    f: int
    g: int
    weight: int
    key_dim: int
    value_dim: int

    def shared_bytes(self, block_heads: int, groups: int) -> int:
        """Room for what ``block_heads`` heads read, which may begin and end within the repeats of a source."""
        sources = [min(count, (block_heads - 1) * count // self.all + 2) for count in (self.q, self.k, self.v)]
        floats = (sources[0] + sources[1]) * self.key_dim + sources[2] * self.value_dim + block_heads
        return 4 * (floats + (3 + groups) * block_heads * self.value_dim)


@lru_cache(maxsize=256)
def _step_kernel(macros: tuple[tuple[str, int], ...], shared_bytes: int, device: int) -> tuple[Kernel, int]:
    """The kernel, and the most blocks in a cluster that run."""
    capability = torch.cuda.get_device_capability(device)
    threads = 32 * dict(macros)["WARPS"]
    kernel = Kernel(cubin("step", macros, capability), "m2rnn_step", threads, shared_bytes, device)
    if capability[0] < 9:
        return kernel, 1
    return kernel, 16 if kernel.fits(16, device) else 8


@lru_cache(maxsize=256)
def _linear_kernel(dtype: torch.dtype, batch: int, pieces: int, device: int) -> Kernel:
    code = cubin("linear", _linear_macros(dtype, batch, pieces), torch.cuda.get_device_capability(device))
    return Kernel(code, "m2rnn_linear", 32 * _LINEAR_WARPS, 0, device)


def _macros(dtype: torch.dtype, value_dim: int, tiles: int, warps: int) -> tuple[tuple[str, int], ...]:
    """Those of common.cuh."""
    kind, parts = _DTYPES[dtype]
    return (
        ("V", value_dim), ("TILES", tiles), ("WARPS", warps), ("SLOTS", 1), ("CHUNK", 8),
        ("INPUT", kind), ("PARTS", parts),
    )  # fmt: skip


def _step_macros(
    dtype: torch.dtype, key_dim: int, value_dim: int, width: int, latency: bool
) -> tuple[tuple[str, int], ...]:
    """Those of step.cu, for few sequences (``latency``) or many."""
    row_tiles = -(-key_dim // 16)
    tiles = 1 if latency else min(row_tiles, max(1, 64 // value_dim), 4)
    warps = 16 if latency and value_dim <= 32 else 8
    # Two blocks fit on a multiprocessor, or one beside the kernel before it; more registers only where they are needed
    frugal = value_dim <= 16 if latency else value_dim <= 32 and dtype == torch.bfloat16
    return (
        *_macros(dtype, value_dim, tiles, warps),
        ("GROUPS", -(-row_tiles // tiles)), ("WIDTH", width), ("MIN_BLOCKS", 2 if frugal else 1),
    )  # fmt: skip


def _linear_macros(dtype: torch.dtype, batch: int, pieces: int) -> tuple[tuple[str, int], ...]:
    """Those of linear.cu."""
    return *_macros(dtype, value_dim=8, tiles=1, warps=_LINEAR_WARPS), ("BATCH", batch), ("PIECES", pieces)


@lru_cache
def _gpu(device: int) -> tuple[int, int, int]:
    """Major compute capability, multiprocessors and the largest shared memory of a block."""
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 0)


@lru_cache
def why_unavailable() -> str | None:
    """Why the kernels cannot be compiled here, or None if they can."""
    return cuda.why_unavailable()


def _heads(token: Token) -> _Heads:
    _, heads, key_dim, value_dim = token.state.shape
    return _Heads(
        heads, token.q_heads, token.k_heads, token.v_heads, token.A_log.shape[0], token.g_heads, token.weight.shape[0],
        key_dim, value_dim,
    )  # fmt: skip


def why_not(token: Token) -> str | None:
    """Why ``step`` cannot take these arguments, or None if it can."""
    if not token.projected.is_cuda:
        return f"the tensors are on {token.projected.device.type}"
    if (reason := why_unavailable()) is not None:
        return reason
    major, _, shared_bytes = _gpu(token.projected.device.index)
    if major < 8:
        return "the GPU's compute capability is below 8.0"
    if token.projected.dtype not in _DTYPES:
        return f"the inputs are {token.projected.dtype}"
    if token.state.shape[3] not in _VALUE_DIMS:
        return f"V is {token.state.shape[3]}"
    if token.conv_weight is not None and token.conv_weight.shape[-1] > _WIDEST_CONVOLUTION:
        return f"the convolution has {token.conv_weight.shape[-1]} taps"
    same = (token.conv_state, token.weight, token.conv_weight, token.conv_bias, token.D, token.norm_weight)
    exact = (token.state, token.A_log, token.dt_bias)
    dtype = token.projected.dtype
    if any(x is not None and x.dtype != dtype for x in same) or any(x.dtype != torch.float32 for x in exact):
        return "the dtypes are mixed"
    if not all(x is None or x.is_contiguous() for x in (*same, *exact)) or token.projected.stride(1) != 1:
        return "the tensors are not contiguous"
    if token.state.data_ptr() % 16:
        return "the state is not aligned to 16 bytes"
    heads = _heads(token)
    if heads.shared_bytes(heads.all, -(-heads.key_dim // 16)) > shared_bytes - 1024:
        return "a sequence's channels do not fit in shared memory"
    return None


def step(token: Token, new_state: Tensor, new_conv_state: Tensor | None) -> Tensor:
    """``decode_step`` of m2rnn/ops/decode/operator.py; the new states may be the token's."""
    batch, device = token.state.shape[0], token.projected.device.index
    heads = _heads(token)
    y = token.projected.new_empty(batch, heads.all * heads.value_dim)
    major, sms, _ = _gpu(device)

    latency = token.state.numel() * 4 <= _LATENCY_BYTES
    width = 0 if token.conv_weight is None else token.conv_weight.shape[-1]
    macros = _step_macros(token.projected.dtype, heads.key_dim, heads.value_dim, width, latency)
    groups = dict(macros)["GROUPS"]

    # One wave of blocks; if there are more sequences than that, small blocks, for a short last wave
    wanted = sms * (1 if latency else 2)
    cluster = 1 if major < 9 else 4 if batch > wanted else 2 ** int(math.log2(wanted / max(batch, 1)))
    cluster = min(cluster, 16, 2 ** int(math.log2(heads.all)))

    def pointer(x: Tensor | None) -> int | None:
        return None if x is None else x.data_ptr()

    head_counts = (heads.q, heads.k, heads.v, heads.f, heads.g, heads.weight)
    with torch.cuda.device(token.projected.device):
        block_heads = -(-heads.all // cluster)
        kernel, largest = _step_kernel(macros, heads.shared_bytes(block_heads, groups), device)
        if cluster > largest:
            cluster, block_heads = largest, -(-heads.all // largest)
            kernel, _ = _step_kernel(macros, heads.shared_bytes(block_heads, groups), device)
        arguments = _Step(
            *(pointer(x) for x in (token.projected, token.state, new_state, token.conv_state, new_conv_state)),
            *(pointer(x) for x in (token.conv_weight, token.conv_bias, token.weight, token.A_log, token.dt_bias)),
            *(pointer(x) for x in (token.D, token.norm_weight, y)),
            token.projected.stride(0), token.norm_eps, heads.all, heads.key_dim, block_heads, token.silu, latency,
            *head_counts, *(count / heads.all for count in head_counts),
        )  # fmt: skip
        if major < 9:
            kernel(batch * cluster, arguments, token.projected.device)
        else:
            kernel.launch_early(batch * cluster, arguments, token.projected.device, cluster)
    return y


def why_not_linear(x: Tensor, weight: Tensor) -> str | None:
    """Why ``linear`` cannot take these arguments, or None if it can."""
    if not x.is_cuda or not weight.is_cuda:
        return f"the tensors are on {x.device.type} and {weight.device.type}"
    if (reason := why_unavailable()) is not None:
        return reason
    if x.dtype not in _DTYPES or weight.dtype != x.dtype:
        return f"the tensors are {x.dtype} and {weight.dtype}"
    if _gpu(x.device.index)[0] < 8:
        return "the GPU's compute capability is below 8.0"
    if not weight.is_contiguous() or weight.data_ptr() % 16 or weight.shape[1] * weight.element_size() % 16:
        return "the weight's rows are not aligned to 16 bytes"
    return None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ`` for x [B, columns], B a handful: every B is a kernel of its own."""
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    y = x.new_empty(x.shape[0], weight.shape[0])
    pieces = min(8, -(-weight.shape[1] * weight.element_size() // (16 * 32)))  # of 16 bytes, for each of 32 lanes
    kernel = _linear_kernel(x.dtype, x.shape[0], pieces, x.device.index)
    arguments = _Linear(x.data_ptr(), weight.data_ptr(), y.data_ptr(), weight.shape[0], weight.shape[1])
    blocks = -(-weight.shape[0] // _LINEAR_WARPS)
    with torch.cuda.device(x.device):
        if _gpu(x.device.index)[0] < 9:
            kernel(blocks, arguments, x.device)
        else:
            kernel.launch_early(blocks, arguments, x.device)
    return y
