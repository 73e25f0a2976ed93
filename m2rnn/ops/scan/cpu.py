"""The CPU backend: plans the work, shares it among threads and calls the compiled loops of ``cpu_kernels.py``.

Memory beyond inputs, outputs and gradients: one state every ``chunk`` steps between forward and backward, and
``chunk`` states of scratch a thread. The result is the same bits for any number of threads, since the units of work
and the order of every sum depend on the shapes alone.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2rnn.ops.backends.choice import why_not_on_device
from m2rnn.ops.backends.cpu import layout as layout
from m2rnn.ops.backends.cpu.code import kernel
from m2rnn.ops.backends.threads import DTYPE_CODES, address, round_up, run_units
from m2rnn.ops.scan.problem import Gradients, Problem, states_between_chunks

UNITS = 64  # pieces to cut the work into: enough for any laptop, and a fixed number keeps the bits the same


def _run(
    name: str,
    plan: "_Plan",
    tensors: np.ndarray,
    sizes: np.ndarray,
    *arrays: Tensor | None,
    clip: tuple[float, ...] = (),
) -> None:
    scratch = layout.scratch_size(plan.chunk, plan.rows, plan.width, backward=name == "backward")
    run_units(name, plan.dtype, scratch, plan.units, tensors, plan.sequences, sizes, *arrays, clip=clip)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@dataclass(frozen=True)
class _Plan:
    """How one problem is cut up: all of it follows from shapes and ``cu_seqlens`` alone."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype  # of the state
    chunk: int
    sequences: np.ndarray  # see the columns in backends/cpu/layout.py
    units: np.ndarray  # see the columns in backends/cpu/layout.py
    head_groups: int
    row_blocks: int

    @cached_property
    def width(self) -> int:
        """V, padded to whole vectors."""
        return round_up(self.value_dim, layout.VECTOR_BYTES // self.dtype.itemsize)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.heads, self.key_dim, self.value_dim

    def head_slots(self, source_heads: int) -> int:
        """How many head groups add to the gradient of the same one of ``source_heads``."""
        repeat = self.heads // source_heads
        if self.group % repeat == 0:
            return 1
        return repeat // self.group if repeat % self.group == 0 else self.head_groups

    def adds(self, repeat: int) -> bool:
        """Whether several heads of a unit add to the gradient of what ``repeat`` heads share."""
        return min(self.group, repeat) > 1

    def sizes(self, weight_heads: int) -> np.ndarray:
        repeat = self.heads // weight_heads
        return np.array([self.heads, self.key_dim, self.value_dim, self.width, self.chunk, repeat], np.int64)

    @cached_property
    def group(self) -> int:
        """Heads of a unit."""
        return self.heads // self.head_groups

    @cached_property
    def rows(self) -> int:
        """Rows of the largest unit, padded."""
        count = int((self.units[:, layout.LAST_ROW] - self.units[:, layout.FIRST_ROW]).max(initial=0))
        return round_up(count, layout.ROWS)

    def describe(self, x: Tensor, *, by_row: bool = False, slots: tuple[int, int] | None = None) -> list[int]:
        """The kernels' row for a tensor [B, T, heads] or [B, T, heads, channels]; with slots, as first dimension."""
        strides = list(x.stride())
        if slots is None:
            strides.insert(0, 0)
        channels, padded = x.shape[-1], self.width
        if len(strides) == 4:
            strides.append(0)
            channels = padded = 1
        repeat = self.heads // x.shape[2 if slots is None else 3]
        code = DTYPE_CODES[x.dtype]
        add = slots is not None and self.adds(repeat)
        return [
            x.data_ptr(), code, *strides, repeat, int(by_row), channels, padded, int(add), *(slots or (1, 1)),
        ]  # fmt: skip

    def describe_inputs(self, q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> list[list[int]]:
        return [
            self.describe(q, by_row=True),
            self.describe(k, by_row=True),
            self.describe(v),
            self.describe(f),
        ]

    def dense(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(self.dtype).contiguous()

    def padded_weight(self, weight: Tensor) -> Tensor:
        padded = torch.zeros(weight.shape[0], self.width, self.width, dtype=self.dtype)
        padded[:, : self.value_dim, : self.value_dim] = weight.detach()
        return padded


def _plan(problem: Problem) -> _Plan:
    fewest_heads = min(x.shape[2] for x in (problem.q, problem.k, problem.v, problem.f))
    sizes = problem.heads, fewest_heads, problem.key_dim, problem.value_dim, problem.state_dtype
    chunk = chunk_length(problem.steps)
    if problem.cu_seqlens is None:
        return _dense_plan(problem.batch, problem.steps, *sizes, chunk)
    bounds = problem.cu_seqlens.numpy().astype(np.int64)
    return _cut(np.zeros(len(bounds) - 1, np.int64), bounds[:-1], np.diff(bounds), *sizes, chunk)


@lru_cache(maxsize=256)  # a model asks for the same few plans again and again
def _dense_plan(batch: int, steps: int, *sizes: Any) -> _Plan:
    return _cut(np.arange(batch), np.zeros(batch, np.int64), np.full(batch, steps, np.int64), *sizes)


def _cut(
    batch: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    heads: int,
    fewest_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    chunk: int,
) -> _Plan:
    """Cut sequences, given by their batch index, first step and length, into about ``UNITS`` units of equal work.

    Shared gradients are summed over units through partial sums. These must not outgrow the saved states, which limits
    the groups of heads where q, k, v or f have fewer heads than others (``fewest_heads``), and the blocks of rows.
    """
    saved = np.maximum(-(-lengths // chunk) - 1, 0)
    sequences = np.stack([batch, starts, lengths, np.cumsum(saved) - saved], axis=1)
    count = len(lengths)
    head_groups = next((g for g in _divisors(heads) if count * g >= UNITS), heads)
    if fewest_heads < heads:
        most = max(1, heads * value_dim // (chunk * fewest_heads))
        head_groups = max(g for g in _divisors(heads) if g <= min(head_groups, most))
    row_blocks = -(-UNITS // max(count * head_groups, 1))
    row_blocks = max(1, min(row_blocks, key_dim // chunk, key_dim // layout.ROWS))
    rows = round_up(-(-key_dim // row_blocks), layout.ROWS)
    row_blocks = -(-key_dim // rows)

    ranges = min(count, -(-UNITS // (head_groups * row_blocks)))
    work = np.concatenate([[0], np.cumsum(lengths + 1)])
    cuts = np.searchsorted(work, np.linspace(0, work[-1], ranges + 1)).tolist()
    group = heads // head_groups
    units = [
        (cuts[s], cuts[s + 1], g * group, (g + 1) * group, r * rows, min((r + 1) * rows, key_dim), r, g)
        for s in range(ranges)
        for r in range(row_blocks)
        for g in range(head_groups)
    ]
    table = np.array(units, np.int64).reshape(-1, 8)
    return _Plan(heads, key_dim, value_dim, dtype, chunk, sequences, table, head_groups, row_blocks)


class _Output:
    """A tensor that units write: straight into place, or into slots of partial sums where several contribute."""

    def __init__(self, plan: _Plan, shape: torch.Size, dtype: torch.dtype, *, by_row: bool):
        slots = (plan.head_slots(shape[2]), 1 if by_row else plan.row_blocks)
        self.dtype = dtype
        self.in_place = slots == (1, 1) and shape[2] == plan.heads
        if self.in_place:
            self.buffer = torch.empty(shape, dtype=dtype)
        else:
            allocate = torch.zeros if plan.adds(plan.heads // shape[2]) else torch.empty
            self.buffer = allocate((slots[0] * slots[1], *shape), dtype=plan.dtype)
        self.row = plan.describe(self.buffer, by_row=by_row, slots=None if self.in_place else slots)

    def result(self) -> Tensor:
        if self.in_place:
            return self.buffer
        first, *others = self.buffer
        total: Tensor = first + others[0] if others else first  # not a view, which would keep the memory of all
        for slot in others[1:]:
            total += slot
        return total.to(self.dtype)


def chunk_length(steps: int) -> int:
    """C, the steps between saved states: a power of two near √T, where T/C saved and C recomputed states balance."""
    return 16 if steps <= 512 else 32 if steps <= 2048 else 64


def why_not(problem: Problem) -> str | None:
    return why_not_on_device("cpu", problem.device)


def saved_like(problem: Problem) -> Tensor:
    """States [n, H, K, V], where ``backward`` starts its chunks; packed sequences leave some of them unused: zeros."""
    chunk, packed = chunk_length(problem.steps), problem.cu_seqlens is not None
    count = problem.steps // chunk if packed else states_between_chunks(problem.batch, problem.steps, chunk)
    saved = problem.new_states(count)
    return saved.zero_() if packed else saved


def forward(problem: Problem, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    q, k, v, f, weight, initial_state, _, _ = problem
    plan, final = _plan(problem), problem.new_states(problem.sequences)
    saved = saved_like(problem) if save else None
    y = _Output(plan, torch.Size(problem.y_shape), problem.output_dtype, by_row=False)
    _run(
        "forward", plan, np.array([*plan.describe_inputs(q, k, v, f), y.row]), plan.sizes(weight.shape[0]),
        plan.padded_weight(weight), plan.dense(initial_state), final, saved,
    )  # fmt: skip
    return y.result(), final, saved


def backward(problem: Problem, saved: Tensor, dy: Tensor, d_final: Tensor | None) -> Gradients:
    q, k, v, f, weight, initial_state, _, state_clip = problem
    plan = _plan(problem)
    gradients = [
        _Output(plan, x.shape, x.dtype, by_row=by_row) for x, by_row in ((q, True), (k, True), (v, False), (f, False))
    ]
    d_initial = None if initial_state is None else torch.empty(initial_state.shape, dtype=plan.dtype)
    padded = plan.padded_weight(weight)
    groups = len(plan.units) // plan.head_groups
    d_weight = torch.empty(groups, plan.heads, plan.width, plan.width, dtype=plan.dtype)
    _run(
        "backward", plan,
        np.array([*plan.describe_inputs(q, k, v, f), plan.describe(dy), *(g.row for g in gradients)]),
        plan.sizes(weight.shape[0]), padded, padded.transpose(1, 2).contiguous(),
        plan.dense(initial_state), saved, plan.dense(d_final), d_initial, d_weight,
        clip=(math.inf if state_clip is None else float(state_clip),),
    )  # fmt: skip

    by_head = np.add.reduce(d_weight.numpy(), axis=0)  # in the units' order
    by_source = np.add.reduce(by_head.reshape(weight.shape[0], -1, plan.width, plan.width), axis=1)
    dw = torch.from_numpy(by_source[:, : plan.value_dim, : plan.value_dim]).to(weight.dtype).contiguous()
    dq, dk, dv, df = (gradient.result() for gradient in gradients)
    if initial_state is not None and d_initial is not None:
        d_initial = d_initial.to(initial_state.dtype)
    return dq, dk, dv, df, dw, d_initial


def tanh(x: np.ndarray) -> np.ndarray:
    """The kernels' own tanh of each element of a float32 or float64 array."""
    padded = np.zeros(round_up(x.size, layout.VECTOR_BYTES // x.itemsize), x.dtype)
    padded[: x.size] = x.ravel()
    out = np.empty_like(padded)
    kernel("apply_tanh", 8 * x.itemsize)(address(padded), address(out), padded.size)
    return out[: x.size].reshape(x.shape)
