"""The CUDA backend: which kernel variant a problem takes, its arguments and its memory.

The result is the same bits on every run: each sum has one order, which follows from the shapes alone.
"""

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from m2rnn.ops.cuda.compiler import cubin
from m2rnn.ops.cuda.driver import Kernel
from m2rnn.ops.shapes import head_count, output_dtype

CHUNK = 32  # steps between saved states
STAGE = 32  # steps in shared memory at a time in the forward pass, as in forward.cu
PAD = 8  # as in common.cuh

_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # INPUT and GATE
_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


class _Strided(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("time", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("repeat", ctypes.c_int32),
    )

    @classmethod
    def of(cls, x: Tensor, heads: int) -> "_Strided":
        """[B, T, heads] or [B, T, heads, channels] with neighbouring channels."""
        return cls(x.data_ptr(), *x.stride()[:3], heads // x.shape[2])


class _Forward(ctypes.Structure):
    _fields_ = (
        *((name, _Strided) for name in "qkvf"),
        *((name, ctypes.c_void_p) for name in ("weight", "initial", "final", "saved", "y", "offsets")),
        ("steps", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("heads", "key_dim", "weight_repeat")),
    )


class _Backward(ctypes.Structure):
    _fields_ = (
        *((name, _Strided) for name in ("q", "k", "v", "f", "dy")),
        *((name, ctypes.c_void_p) for name in ("weight", "initial", "saved", "offsets", "carry")),
        *((name, ctypes.c_void_p) for name in ("dq", "dk", "dv", "df", "dweight")),
        *((name, ctypes.c_int64) for name in ("steps", "window_begin", "window_end")),
        *((name, ctypes.c_int32) for name in ("heads", "key_dim", "key_stride", "weight_repeat", "sequences", "lanes")),
        ("dv_float", ctypes.c_int32),
        ("clip", ctypes.c_float),
    )


class _Sum(ctypes.Structure):
    _fields_ = (
        ("partial", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("steps", "window_begin", "window", "batches")),
        *((name, ctypes.c_int32) for name in ("groups", "row")),
    )


@dataclass(frozen=True)
class _Variant:
    """What the kernels are compiled for."""

    value_dim: int
    tiles: int
    warps: int
    slots: int
    dtype: torch.dtype
    gate: torch.dtype
    min_blocks: int = 1
    clip: bool = False

    @property
    def parts(self) -> int:
        return _PARTS[self.dtype]

    @property
    def macros(self) -> tuple[tuple[str, int], ...]:
        return (
            ("V", self.value_dim), ("TILES", self.tiles), ("WARPS", self.warps), ("SLOTS", self.slots),
            ("CHUNK", CHUNK),
            ("INPUT", _TYPES[self.dtype]), ("GATE", _TYPES[self.gate]), ("PARTS", self.parts),
            ("MIN_BLOCKS", self.min_blocks), ("CLIP", int(self.clip)),
        )  # fmt: skip

    @property
    def threads(self) -> int:
        return 32 * self.warps * self.slots

    @property
    def rows(self) -> int:
        return 16 * self.tiles * self.warps

    def tile_bytes(self, length: int, columns: int) -> int:
        return self.parts * length * (columns + PAD) * 2

    @property
    def forward_shared_bytes(self) -> int:
        rows = 2 * self.tile_bytes(STAGE, self.rows)
        columns = self.tile_bytes(STAGE, self.value_dim) + 4 * STAGE
        sums = self.warps * STAGE * (self.value_dim + 4) * 4
        return 2 * (rows + self.slots * (columns + sums))

    @property
    def backward_shared_bytes(self) -> int:
        registers = 2 if self.value_dim == 8 else 4
        states = 4 * self.tiles * self.parts * -(-self.value_dim // 16) * 32 * 4 * registers
        gradients = 4 * 8 * (2 * (16 * self.tiles + 4) + self.value_dim + 4 + 1)
        alignment = 4 * registers
        kept = -(-max(states, gradients) // alignment) * alignment
        columns = 2 * self.tile_bytes(CHUNK, self.value_dim) + 4 * CHUNK
        return 2 * self.tile_bytes(CHUNK, self.rows) + self.slots * (CHUNK // 8 * self.warps * kept + columns)


@lru_cache(maxsize=256)
def _kernel(name: str, variant: _Variant, shared_bytes: int, device: int) -> Kernel:
    capability = torch.cuda.get_device_capability(device)
    code = cubin(name, variant.macros, capability)
    return Kernel(code, f"m2rnn_{name}", variant.threads, shared_bytes, device)


@lru_cache(maxsize=256)
def _kernel_sum(variant: _Variant, device: int) -> Kernel:
    code = cubin("backward", variant.macros, torch.cuda.get_device_capability(device))
    return Kernel(code, "m2rnn_sum", 128, 0, device)


def _aligned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x itself if the kernels can read it in place, with neighbouring channels in aligned groups of 16 bytes."""
    x = x.to(dtype)
    group = 16 // x.element_size()
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % group == 0 for stride in x.stride()[:-1]):
        return x
    padded = x.new_zeros(*x.shape[:-1], -(-x.shape[-1] // group) * group)[..., : x.shape[-1]]
    return padded.copy_(x)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


MIN_BLOCKS = 1
TILES = 1
SLOTS = 0


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, final state, saved states)``: the saved states [n, H, K, V] are where ``backward`` starts its chunks."""
    heads, dtype = head_count(q, k, v, f, weight), output_dtype(q, k, v)
    batch, steps, _, key_dim = q.shape
    value_dim = v.shape[3]
    q, k, v = (_aligned(x, dtype) for x in (q, k, v))
    weight = weight.float().contiguous()
    initial = None if initial_state is None else initial_state.float().contiguous()
    offsets = None if cu_seqlens is None else cu_seqlens.long().contiguous()
    sequences = batch if offsets is None else len(offsets) - 1
    final = q.new_empty(sequences, heads, key_dim, value_dim, dtype=torch.float32)
    y = q.new_empty(batch, steps, heads, value_dim)
    saved_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    count = batch * (max(steps - 1, 0) // CHUNK) if save else 0
    saved = q.new_empty(count, heads, key_dim, value_dim, dtype=saved_dtype)
    tiles = TILES
    variant = _Variant(value_dim, tiles, -(-key_dim // (16 * tiles)), 1, dtype, f.dtype, MIN_BLOCKS)
    kernel = _kernel("forward", variant, variant.forward_shared_bytes, q.device.index)
    arguments = _Forward(
        *(_Strided.of(x, heads) for x in (q, k, v, f)),
        *(_pointer(x) for x in (weight, initial, final, saved if save else None, y, offsets)),
        steps, heads, key_dim, heads // weight.shape[0],
    )  # fmt: skip
    with torch.cuda.device(q.device):
        kernel(sequences * heads // variant.slots, arguments, q.device)
    return y, final, saved


PARTIAL_BYTES = 96 << 20  # for sums of dq and dk over groups of heads
DWEIGHT_BYTES = 64 << 20  # for sums of dW over sequences


def _slots(sequences: int, heads: int, shared_heads: int, warps: int, sms: int) -> int:
    """Heads a block: those that keep the busiest multiprocessor's heads few, and of these the most, for fewer sums."""
    fits = [s for s in range(1, 5) if shared_heads % s == 0 and s * warps <= 16]
    return min(fits, key=lambda s: (s * -(-sequences * heads // s // sms), -s))


def backward(
    dy: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    saved: Tensor,
    cu_seqlens: Tensor | None,
    state_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v, f, the weight and the initial state, in the dtypes of these."""
    inputs = (q, k, v, f, weight)
    heads, dtype = head_count(*inputs), output_dtype(q, k, v)
    batch, steps, _, key_dim = q.shape
    value_dim = v.shape[3]
    q, k, v, dy = (_aligned(x, dtype) for x in (q, k, v, dy))
    weight = weight.float().contiguous()
    initial = None if initial_state is None else initial_state.float().contiguous()
    offsets = None if cu_seqlens is None else cu_seqlens.long().contiguous()
    sequences = batch if offsets is None else len(offsets) - 1
    state_shape = (sequences, heads, key_dim, value_dim)
    if d_final is None:
        carry = q.new_zeros(state_shape, dtype=torch.float32)
    else:
        carry = d_final.to(torch.float32, copy=True).contiguous()

    repeats = [heads // x.shape[2] for x in (q, k)]
    sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    tiles = TILES
    slots = SLOTS or _slots(sequences, heads, math.gcd(*repeats), -(-key_dim // 16), sms)
    variant = _Variant(value_dim, tiles, -(-key_dim // (16 * tiles)), slots, dtype, f.dtype, 1, state_clip is not None)
    kernel = _kernel("backward", variant, variant.backward_shared_bytes, q.device.index)
    lanes = max(1, min(sequences, DWEIGHT_BYTES // (heads * value_dim**2 * 4)))
    key_stride = -(-key_dim // 8) * 8
    dv = q.new_empty(batch, steps, heads, value_dim, dtype=dtype if v.shape[2] == heads else torch.float32)
    df = q.new_empty(batch, steps, heads, dtype=torch.float32)
    dweight = q.new_zeros(lanes, heads, value_dim, value_dim, dtype=torch.float32)

    outs = [q.new_empty(batch, steps, x.shape[2], key_stride) for x in (q, k)]
    groups = [repeat // slots for repeat in repeats]
    step_bytes = sum(4 * g * x.shape[2] * key_stride * batch for g, x in zip(groups, (q, k), strict=True) if g > 1)
    window = steps if step_bytes == 0 else max(CHUNK, PARTIAL_BYTES // step_bytes // CHUNK * CHUNK)
    window = max(1, min(window, steps))
    partials = [
        x if g == 1 else q.new_empty(g * batch * window * x.shape[2] * key_stride, dtype=torch.float32)
        for g, x in zip(groups, outs, strict=True)
    ]
    with torch.cuda.device(q.device):
        for begin in range((steps - 1) // window * window, -1, -window):
            end = min(begin + window, steps)
            arguments = _Backward(
                *(_Strided.of(x, heads) for x in (q, k, v, f, dy)),
                *(_pointer(x) for x in (weight, initial, saved, offsets, carry, *partials, dv, df, dweight)),
                steps, begin, end, heads, key_dim, key_stride, heads // weight.shape[0], sequences, lanes,
                dv.dtype == torch.float32, math.inf if state_clip is None else state_clip,
            )  # fmt: skip
            kernel(lanes * heads // slots, arguments, q.device)
            for g, partial, out in zip(groups, partials, outs, strict=True):
                if g > 1:
                    row = out.shape[2] * key_stride
                    total = _kernel_sum(variant, q.device.index)
                    total(
                        -(-batch * (end - begin) * row // 4 // 128),
                        _Sum(_pointer(partial), _pointer(out), steps, begin, end - begin, batch, g, row),
                        q.device,
                    )
    dq, dk = (out[..., :key_dim] for out in outs)
    return (
        dq.to(inputs[0].dtype).contiguous(), dk.to(inputs[1].dtype).contiguous(),
        _sum_heads(dv, 2, inputs[2]), _sum_heads(df, 2, inputs[3]),
        _sum_heads(dweight.sum(0), 0, inputs[4]), None if initial_state is None else carry.to(initial_state.dtype),
    )  # fmt: skip


def _sum_heads(gradient: Tensor, dim: int, like: Tensor) -> Tensor:
    """Sum the heads that read the same source head, as many as ``like`` has along ``dim``."""
    if gradient.shape[dim] != like.shape[dim]:
        gradient = gradient.unflatten(dim, (like.shape[dim], -1)).sum(dim + 1)
    return gradient.to(like.dtype)
