"""The CUDA backend: which kernel variant a problem takes, its arguments and its memory.

The result is the same bits on every run: each sum has one order, which follows from the shapes and the GPU alone.
"""

import ctypes
import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from m2rnn.ops.backends.choice import why_not_on_device
from m2rnn.ops.backends.cuda.gpu import Gpu, Launch, Limits, gpu_of
from m2rnn.ops.scan.problem import Gradients, Problem, states_between_chunks

CHUNK = 32  #: steps between saved states
PAD = 8  # as in common.cuh
FORWARD_SLICE, BACKWARD_SLICE = 256, 512  # steps of the shortest slice of time, long against a block's start
# For sums of dq and dk over groups of heads. Sequences of a pack are worked on at once where all of their time fits.
PARTIAL_BYTES, PACKED_PARTIAL_BYTES = 64 << 20, 512 << 20
# A step of the backward pass on a multiprocessor of an H100, by its warps: 4 (and 4 that work ahead), 8 (and 8), 12 and
# 16. And what a block's partial sums of a step cost, with all multiprocessors at it.
STEP_NS = (230, 366, 520, 617)
PARTIAL_NS = 0.2
DWEIGHT_BYTES = 64 << 20  # for sums of dW over sequences

_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # INPUT


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
        *((name, ctypes.c_void_p) for name in ("weight", "initial", "final", "saved", "y", "offsets", "finished")),
        *((name, ctypes.c_int64) for name in ("steps", "slice")),
        *((name, ctypes.c_int32) for name in ("heads", "key_dim", "weight_repeat", "sequences")),
    )


class _Backward(ctypes.Structure):
    _fields_ = (
        *((name, _Strided) for name in ("q", "k", "v", "f", "dy")),
        *((name, ctypes.c_void_p) for name in ("weight", "initial", "saved", "offsets", "carry")),
        *((name, ctypes.c_void_p) for name in ("dq", "dk", "dq_parts", "dk_parts", "dv", "df", "dweight", "counters")),
        *((name, ctypes.c_int64) for name in ("steps", "window", "slice")),
        *((name, ctypes.c_int32) for name in ("heads", "key_dim", "key_stride", "weight_repeat", "sequences", "lanes")),
        *((name, ctypes.c_int32) for name in ("windows", "sum_blocks", "dv_float")),
        ("clip", ctypes.c_float),
    )


@dataclass(frozen=True)
class _Variant:
    """What the kernels are compiled for."""

    value_dim: int
    warps: int
    slots: int
    dtype: torch.dtype
    parts: int
    clip: bool = False
    ahead: bool = False
    together: int = 1  # blocks that a multiprocessor runs at a time; 0, forward: as the compiler guesses

    def macros(self, source: str) -> tuple[tuple[str, int], ...]:
        return (
            ("V", self.value_dim), ("WARPS", self.warps), ("SLOTS", self.slots),
            ("CHUNK", CHUNK),
            ("INPUT", _TYPES[self.dtype]), ("PARTS", self.parts),
            ("CLIP", int(self.clip)), ("AHEAD", int(self.ahead)), ("TOGETHER", self.together),
            ("SHARED_BYTES", self.shared_bytes(source)),
        )  # fmt: skip

    @property
    def threads(self) -> int:
        return 32 * self.warps * self.slots * (1 + self.ahead)

    @property
    def rows(self) -> int:
        return 16 * self.warps

    def tile_bytes(self, stride: int) -> int:
        return self.parts * CHUNK * stride * 2

    def shared_bytes(self, source: str) -> int:
        """The size of ForwardShared or BackwardShared, which the sources check."""
        if source == "forward":
            keys_values = self.rows + self.value_dim + (16 if self.value_dim == 8 else 8)
            inputs = self.tile_bytes(self.rows + PAD) + self.tile_bytes(keys_values) + 4 * CHUNK
            sums = self.warps * CHUNK * (self.value_dim + 4) * 4
            return 2 * (inputs + sums)
        registers, operands = 2 if self.value_dim == 8 else 4, -(-self.value_dim // 16)
        states = self.parts * operands * 32 * 4 * registers
        gradients = 2 * 8 * (2 + operands) * 8
        pair = _multiple(max(states, gradients), 4 * registers)
        octets = (1 + self.ahead) * CHUNK // 8
        kept = self.warps * (octets * _multiple(4 * pair + 4 * 8, 64) + (2 + self.ahead) * states)
        rows = 2 * self.tile_bytes(self.rows + PAD)
        columns = 2 * self.tile_bytes(self.value_dim + PAD) + 4 * CHUNK
        saved = self.warps * 16 * self.value_dim * (2 if self.parts == 1 else 4)
        inputs = (3 if self.ahead else 1) * (rows + self.slots * (columns + saved))
        place = 10 * 8
        moves = self.parts == 1 and not self.ahead and self.value_dim == 16 and (self.warps, self.slots) == (4, 2)
        share = 5 * 8 * self.threads if moves else 0
        return _multiple(self.slots * (kept + 4 * self.warps * self.value_dim**2 + place) + inputs + 16 + share, 64)


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


@lru_cache(maxsize=256)
def _kernel(gpu: Gpu, name: str, variant: _Variant, shared_bytes: int = 0) -> Launch:
    """With at least that much shared memory, which limits how many blocks a multiprocessor runs at a time."""
    shared_bytes = max(shared_bytes, variant.shared_bytes(name))
    return gpu.kernel(name, variant.macros(name), variant.threads, shared_bytes)


def why_not(problem: Problem) -> str | None:
    if (reason := why_not_on_device("cuda", problem.device)) is not None:
        return reason
    major, minor = torch.cuda.get_device_capability(problem.device)
    if major < 8:
        gpu = torch.cuda.get_device_name(problem.device)
        return f"{gpu} has compute capability {major}.{minor}, and the CUDA kernels need 8.0"
    if problem.state_dtype == torch.float64:
        return "the CUDA kernels have a float32 state, not float64"
    value_dim, dtype = problem.value_dim, problem.output_dtype
    if value_dim > 64:
        return f"V is {value_dim}, and the CUDA kernels take up to 64"
    least = _Variant(_width(value_dim), 1, 1, dtype, _MOST_PARTS[dtype])  # for sequences of any length
    if least.shared_bytes("backward") > gpu_of(problem.device).limits.shared_limit:
        gpu = torch.cuda.get_device_name(problem.device)
        return f"V is {value_dim} in {str(dtype)[6:]}, for which {gpu} has too little shared memory"
    return None


def saved_like(problem: Problem) -> Tensor:
    """States [n, H, K, V], where ``backward`` starts its chunks, as wide as the kernels' V, or wider.

    Chunks start at multiples of their length, whether sequences are packed or not.
    """
    count = states_between_chunks(problem.batch, problem.steps, CHUNK)
    shape = count, problem.heads, problem.key_dim, _width(problem.value_dim)
    return problem.q.new_empty(shape, dtype=problem.output_dtype if _parts(problem) == 1 else torch.float32)


def _width(value_dim: int) -> int:
    """V as the kernels have it: the next of 8, 16, 32 and 64."""
    return next(width for width in (8, 16, 32, 64) if value_dim <= width)


# How many bfloat16 numbers each number is the sum of in the kernels' matrix products
_MOST_PARTS = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 3}


def _parts(problem: Problem) -> int:
    """One for bfloat16. But y of few steps (of a pack, on average) may be a sum that cancels: a second costs little."""
    sequences = 1 if problem.cu_seqlens is None else problem.sequences
    few = problem.steps <= CHUNK * sequences
    return 1 if problem.output_dtype == torch.bfloat16 and not few else _MOST_PARTS[problem.output_dtype]


def _aligned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x itself if the kernels can read it in place, with neighbouring channels in aligned groups of 16 bytes.

    They read whole groups: what follows the channels in the last one has to be zero.
    """
    x = x.to(dtype)
    group = 16 // x.element_size()
    whole = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and x.shape[-1] % group == 0
    if whole and all(stride % group == 0 for stride in x.stride()[:-1]):
        return x
    padded = x.new_zeros(*x.shape[:-1], -(-x.shape[-1] // group) * group)[..., : x.shape[-1]]
    return padded.copy_(x)


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _dense(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


@lru_cache(maxsize=256)
def _plan(units: int, shared_heads: int, single: _Variant, limits: Limits) -> _Variant:
    """The quickest variant of the backward pass, by estimate.

    The heads of a block share q, k and sums of dq and dk. Several small blocks on a multiprocessor are at different
    phases, which is better than one large block. Fewer warps at a time take longer for the same work, but leave no
    multiprocessor idle.
    """
    quickest, best = math.inf, single
    for slots in (s for s in range(1, 5) if shared_heads % s == 0 and (s == 1 or s * single.warps <= 8)):
        for together in range(1, max(1, 16 // (slots * single.warps)) + 1):
            variant = replace(single, slots=slots, together=together)
            warps = slots * single.warps * together
            ahead = replace(variant, ahead=True)
            if 2 * warps <= 16 and _fits(ahead, limits):
                variant = ahead
            elif not _fits(variant, limits) and (slots > 1 or together > 1):
                continue
            rounds = max(units / slots / together / limits.multiprocessors, 1)
            time = rounds * STEP_NS[min(-(-warps // 4), 4) - 1] + PARTIAL_NS * units / slots
            if time < quickest:
                quickest, best = time, variant
    return best


def _fits(variant: _Variant, limits: Limits) -> bool:
    size, reserved = variant.shared_bytes("backward"), 1 << 10  # bytes that CUDA takes of each block's
    return size <= limits.shared_limit and variant.together * (size + reserved) <= limits.shared_total


def _slices(units: int, together: int, steps: int, sequence_steps: int, shortest: int, multiprocessors: int) -> int:
    """The length of slices of time, not less than ``steps`` if units spread evenly over the GPU.

    Not where the busiest multiprocessor runs all of its units ``together``. A slice is a part of a sequence, of
    ``sequence_steps`` on average, and there are blocks for one of ``steps``.
    """
    whole = _multiple(max(steps, 1), CHUNK)
    busiest = -(-units // multiprocessors)
    if busiest <= together or busiest * multiprocessors < 1.03 * units or sequence_steps < 4 * shortest:
        return whole
    return max(shortest, _multiple(max(sequence_steps // 64, steps // 256), CHUNK))


@lru_cache(maxsize=256)
def _row_groups(variant: _Variant, key_dim: int, shared_limit: int) -> list[slice]:
    """Rows of the state to work on together: all of them, unless a block has not the shared memory or threads.

    Rows are independent of each other, so a state of many rows is several of few.
    """
    rows = key_dim
    while rows > 16 and (variant.shared_bytes("backward") > shared_limit or variant.threads > 512):
        rows = -(-rows // 32) * 16
        variant = replace(variant, warps=-(-rows // 16))
    return [slice(first, min(first + rows, key_dim)) for first in range(0, key_dim, rows)]


def forward(problem: Problem, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    value_dim, missing = problem.value_dim, _width(problem.value_dim) - problem.value_dim
    if missing:
        y, final, saved = forward(_padded(problem, missing), save)
        return y[..., :value_dim].contiguous(), final[..., :value_dim].contiguous(), saved
    gpu, variant = gpu_of(problem.device), replace(_variant(problem), clip=False)
    limits = gpu.limits
    groups = _row_groups(variant, problem.key_dim, limits.shared_limit)
    if len(groups) > 1:
        parts = [forward(_of_rows(problem, rows), save) for rows in groups]
        ys, finals, saves = (list(x) for x in zip(*parts, strict=True))
        return _sum_parts(ys), torch.cat(finals, 2), torch.cat(saves, 2) if save else None

    q, k, v, f, weight, initial_state, cu_seqlens, _ = problem
    heads, dtype, batch, steps = problem.heads, problem.output_dtype, problem.batch, problem.steps
    sequences, key_dim = problem.sequences, problem.key_dim
    y, saved = problem.new_y(), saved_like(problem) if save else None
    final = problem.new_states(sequences)
    q, k, v = (_aligned(x, dtype) for x in (q, k, v))
    f, weight = f.float(), weight.float().contiguous()
    initial, offsets = _dense(initial_state, torch.float32), _dense(cu_seqlens, torch.int64)

    with gpu.current():
        units = sequences * heads
        # As many blocks as a multiprocessor gets, for which the compiler may take registers. Its own guess is the best
        # at V = 16, but leaves registers to blocks that do not come: where heads are few or shared memory is short.
        together = 0
        if variant.warps <= 4 and units <= 2 * limits.multiprocessors:
            together = 1
        elif variant.warps <= 4 and variant.parts == 1 and value_dim == 32:
            together = 3
        variant = replace(variant, together=together)
        length = _slices(units, 2, steps, steps * batch // max(sequences, 1), FORWARD_SLICE, limits.multiprocessors)
        slices = max(-(-steps // length), 1)  # without steps too, the final state is the initial one
        finished = torch.zeros(units, dtype=torch.int32, device=q.device) if slices > 1 else None
        arguments = _Forward(
            *(_Strided.of(x, heads) for x in (q, k, v, f)),
            *(_pointer(x) for x in (weight, initial, final, saved, y, offsets, finished)),
            steps, length, heads, key_dim, heads // weight.shape[0], sequences,
        )  # fmt: skip
        _kernel(gpu, "forward", variant)(slices * units, arguments, q.device)
    return y, final, saved


def backward(problem: Problem, saved: Tensor, dy: Tensor, d_final: Tensor | None) -> Gradients:
    value_dim, missing = problem.value_dim, _width(problem.value_dim) - problem.value_dim
    if missing:
        dq, dk, dv, df, dweight, d_initial = backward(
            _padded(problem, missing), saved, pad(dy, (0, missing)), _pad(d_final, missing)
        )
        dv, dweight = dv[..., :value_dim].contiguous(), dweight[:, :value_dim, :value_dim].contiguous()
        return dq, dk, dv, df, dweight, None if d_initial is None else d_initial[..., :value_dim].contiguous()
    gpu, single = gpu_of(problem.device), _variant(problem)
    limits = gpu.limits
    row_groups = _row_groups(single, problem.key_dim, limits.shared_limit)
    if len(row_groups) > 1:
        parts = [backward(_of_rows(problem, rows), saved[:, :, rows], dy, _rows(d_final, rows)) for rows in row_groups]
        dq, dk = (torch.cat(x, 3) for x in ([part[0] for part in parts], [part[1] for part in parts]))
        dv, df, dweight = (
            _sum_parts(x)
            for x in ([part[2] for part in parts], [part[3] for part in parts], [part[4] for part in parts])
        )
        d_initials = [part[5] for part in parts if part[5] is not None]
        return dq, dk, dv, df, dweight, torch.cat(d_initials, 2) if d_initials else None

    q, k, v, f, weight, initial_state, cu_seqlens, state_clip = problem
    inputs = (q, k, v, f, weight)
    heads, dtype, batch, steps = problem.heads, problem.output_dtype, problem.batch, problem.steps
    sequences, key_dim = problem.sequences, problem.key_dim
    q, k, v, dy = (_aligned(x, dtype) for x in (q, k, v, dy))
    f, weight, saved = f.float(), weight.float().contiguous(), saved.contiguous()
    initial, offsets = _dense(initial_state, torch.float32), _dense(cu_seqlens, torch.int64)
    if d_final is None:
        carry = q.new_zeros(sequences, heads, key_dim, value_dim, dtype=torch.float32)
    else:
        carry = d_final.to(torch.float32, copy=True).contiguous()
    lanes = max(1, min(sequences, DWEIGHT_BYTES // (heads * value_dim**2 * 4)))
    dweight = q.new_zeros(lanes, heads, value_dim, value_dim, dtype=torch.float32)
    dv = q.new_empty(batch, steps, heads, value_dim, dtype=dtype if v.shape[2] == heads else torch.float32)
    df = q.new_empty(batch, steps, heads, dtype=torch.float32)
    key_stride = -(-key_dim // 8) * 8
    outs = [q.new_empty(batch, steps, x.shape[2], key_stride) for x in (q, k)]

    with gpu.current():
        repeats = [heads // x.shape[2] for x in (q, k)]
        variant = _plan(lanes * heads, math.gcd(*repeats), single, limits)
        units = lanes * heads // variant.slots

        # Several blocks share a head of q or k: their partial sums are kept for two windows of time
        groups = [repeat // variant.slots for repeat in repeats]
        rows = [x.shape[2] * key_stride for x in (q, k)]
        parts_dtype = q.dtype if variant.parts == 1 else torch.float32
        step_bytes = sum(parts_dtype.itemsize * batch * g * row for g, row in zip(groups, rows, strict=True) if g > 1)
        sequence_steps = steps * batch // max(sequences, 1)
        length = _slices(units, variant.together, steps, sequence_steps, BACKWARD_SLICE, limits.multiprocessors)
        window, length = _window(steps, step_bytes, length, PARTIAL_BYTES if offsets is None else PACKED_PARTIAL_BYTES)
        windows, slices = -(-steps // window), -(-window // length)
        sums = [
            q.new_empty(min(windows, 2) * g * batch * window * row, dtype=parts_dtype) if g > 1 else None
            for g, row in zip(groups, rows, strict=True)
        ]
        sum_blocks = limits.multiprocessors if step_bytes else 0
        counters = None
        if windows * slices > 1 or sum_blocks:
            counters = torch.zeros(units + 2 * windows, dtype=torch.int32, device=q.device)
        arguments = _Backward(
            *(_Strided.of(x, heads) for x in (q, k, v, f, dy)),
            *(_pointer(x) for x in (weight, initial, saved, offsets, carry)),
            *(_pointer(x) for x in (*outs, *sums, dv, df, dweight, counters)),
            steps, window, length, heads, key_dim, key_stride, heads // weight.shape[0], sequences, lanes,
            windows, sum_blocks, dv.dtype == torch.float32, math.inf if state_clip is None else state_clip,
        )  # fmt: skip
        # Bytes that keep more blocks away
        crowded = min(limits.shared_total // (variant.together + 1), limits.shared_limit)
        blocks = windows * (units * slices + sum_blocks) + sum_blocks
        _kernel(gpu, "backward", variant, crowded)(blocks, arguments, q.device)
    dq, dk = (out[..., :key_dim].to(x.dtype).contiguous() for out, x in zip(outs, inputs, strict=False))
    return (
        dq, dk, _sum_heads(dv, 2, inputs[2]), _sum_heads(df, 2, inputs[3]), _sum_heads(dweight.sum(0), 0, inputs[4]),
        None if initial_state is None else carry.to(initial_state.dtype),
    )  # fmt: skip


def _window(steps: int, step_bytes: int, slice_length: int, limit: int) -> tuple[int, int]:
    """Steps of a window of time and of its slices: whole slices, windows about equal, sums of two windows fit."""
    if steps * step_bytes <= limit:
        return max(steps, 1), slice_length
    fit = max(limit // 2 // step_bytes // CHUNK, 1) * CHUNK
    unit = slice_length if slice_length < fit else CHUNK
    count = -(-steps // unit)
    window = -(-count // -(-count // (fit // unit))) * unit
    return window, min(slice_length, window)


def _variant(problem: Problem) -> _Variant:
    """One head a block, all rows of its state."""
    warps, clip = -(-problem.key_dim // 16), problem.state_clip is not None
    return _Variant(problem.value_dim, warps, 1, problem.output_dtype, _parts(problem), clip)


def _of_rows(problem: Problem, rows: slice) -> Problem:
    """The same for some rows of the state."""
    q, k = problem.q[..., rows], problem.k[..., rows]
    return problem._replace(q=q, k=k, initial_state=_rows(problem.initial_state, rows))


def _padded(problem: Problem, missing: int) -> Problem:
    """The same with columns of zeros, which stay zero and change nothing: tanh(0) = 0."""
    return problem._replace(
        v=pad(problem.v, (0, missing)),
        weight=pad(problem.weight, (0, missing) * 2),
        initial_state=_pad(problem.initial_state, missing),
    )


def _rows(state: Tensor | None, rows: slice) -> Tensor | None:
    return None if state is None else state[:, :, rows]


def _pad(state: Tensor | None, missing: int) -> Tensor | None:
    return None if state is None else pad(state, (0, missing))


def _sum_parts(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0, dtype=torch.float32).to(parts[0].dtype)


def _sum_heads(gradient: Tensor, dim: int, like: Tensor) -> Tensor:
    """Sum the heads that read the same source head, as many as ``like`` has along ``dim``."""
    if gradient.shape[dim] != like.shape[dim]:
        gradient = gradient.unflatten(dim, (like.shape[dim], -1)).sum(dim + 1)
    return gradient.to(like.dtype)
