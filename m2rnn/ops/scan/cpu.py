"""The CPU backend: plans the work, shares it among threads and calls the compiled loops of ``cpu_kernels.py``.

Memory beyond inputs, outputs and gradients: one state every ``chunk`` steps between forward and backward, and
``chunk`` states of scratch a thread. The result is the same bits for any number of threads, since the units of work
and the order of every sum depend on the shapes alone.
"""

import ctypes
import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2rnn.ops.backends.cpu import layout as layout
from m2rnn.ops.backends.cpu.code import kernel
from m2rnn.ops.backends.shapes import chunk_length, head_count, output_dtype, saved_states, state_dtype
from m2rnn.ops.scan.operator import IMPORTED_IN  # this module may be imported in a forked process first

UNITS = 64  # pieces to cut the work into: enough for any laptop, and a fixed number keeps the bits the same
CALLS_PER_THREAD = 4  # so that a thread that is late leaves work for the others

DTYPE_CODES = {
    torch.float32: layout.FLOAT32,
    torch.float64: layout.FLOAT64,
    torch.bfloat16: layout.BFLOAT16,
    torch.float16: layout.FLOAT16,
}


_WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@lru_cache(maxsize=1)
def _openmp() -> Callable[..., None] | None:
    """``GOMP_parallel(work, data, threads, flags)`` of the OpenMP library that PyTorch itself runs on, if it is GNU's.

    Its threads spin for some milliseconds after each of PyTorch's operators, ready for the next: threads of our own
    would compete with them for the cores. Not in a forked process, which OpenMP's threads do not survive.
    """
    if os.getpid() != IMPORTED_IN:
        return None
    for library in Path(torch.__file__).parent.glob("lib/libgomp*"):
        try:
            parallel: Callable[..., None] = ctypes.CDLL(str(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return parallel
    return None


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="m2rnn")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)
    os.register_at_fork(after_in_child=_openmp.cache_clear)


def _wait_for(others: list[Future[None]]) -> None:
    """Until all are done, whatever comes: Ctrl-C would free the memory that they read and write."""
    interrupt = None
    while not all(other.done() for other in others):
        try:
            wait(others)
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _on_threads(threads: int, work: Callable[[], None]) -> None:
    """Call ``work`` on each of several threads, of which the caller's is one; raises what it raised on any."""
    parallel = _openmp()
    if parallel is None:
        others: list[Future[None]] = []
        try:
            others.extend(_pool(threads - 1).submit(work) for _ in range(threads - 1))
            work()
        finally:
            _wait_for(others)
        for other in others:
            other.result()
        return
    errors: list[BaseException] = []

    def call(_: int | None) -> None:
        try:
            work()
        except BaseException as error:  # it cannot pass through OpenMP
            errors.append(error)

    parallel(_WORK(call), None, threads, 0)
    if errors:
        raise errors[0]


def _address(x: Tensor | np.ndarray | None) -> int:
    if x is None:
        return 0
    return x.data_ptr() if isinstance(x, Tensor) else x.ctypes.data


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


def run_units(
    name: str,
    dtype: torch.dtype,
    scratch: int,
    units: np.ndarray,
    tensors: np.ndarray,
    sequences: np.ndarray,
    sizes: np.ndarray,
    *arrays: Tensor | None,
    clip: tuple[float, ...] = (),
) -> None:
    """Call a kernel on ranges of the units, with scratch memory for each thread, until all of them are done."""
    call = kernel(name, 8 * dtype.itemsize)
    tables = [_address(x) for x in (units, tensors, sequences, sizes)]
    others = [*(_address(x) for x in arrays), *clip]
    scratch += layout.VECTOR_BYTES // dtype.itemsize
    count = len(units)
    threads = min(torch.get_num_threads(), count)
    calls = min(count, CALLS_PER_THREAD * threads) if threads > 1 else threads
    ranges = iter([(i * count // calls, (i + 1) * count // calls) for i in range(calls)])

    def work() -> None:
        memory = torch.empty(scratch, dtype=dtype)
        aligned = round_up(memory.data_ptr(), layout.VECTOR_BYTES)  # vectors that straddle two lines cost twice
        for first, last in ranges:  # next() of a list's iterator is atomic, so each range goes to one thread
            call(first, last, *tables, aligned, *others)

    if threads > 1:
        _on_threads(threads, work)
    else:
        work()


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


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


def _plan(q: Tensor, k: Tensor, v: Tensor, f: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> _Plan:
    heads = head_count(q, k, v, f, weight)
    fewest_heads = min(x.shape[2] for x in (q, k, v, f))
    problem = (
        heads,
        fewest_heads,
        q.shape[3],
        v.shape[3],
        state_dtype(q, k, v, f, weight),
        chunk_length(q.shape[1]),
    )
    if cu_seqlens is None:
        return _dense_plan(q.shape[0], q.shape[1], *problem)
    bounds = cu_seqlens.numpy().astype(np.int64)
    return _cut(np.zeros(len(bounds) - 1, np.int64), bounds[:-1], np.diff(bounds), *problem)


@lru_cache(maxsize=256)  # a model asks for the same few plans again and again
def _dense_plan(batch: int, steps: int, *problem: Any) -> _Plan:
    return _cut(np.arange(batch), np.zeros(batch, np.int64), np.full(batch, steps, np.int64), *problem)


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
    plan = _plan(q, k, v, f, weight, cu_seqlens)
    final = torch.empty(len(plan.sequences), *plan.state_shape, dtype=plan.dtype)
    count = saved_states(q.shape[0], q.shape[1], cu_seqlens is not None) if save else 0
    allocate = torch.empty if cu_seqlens is None else torch.zeros  # packed sequences leave some of it unused
    saved = allocate(count, *plan.state_shape, dtype=plan.dtype)
    y = _Output(plan, torch.Size((*v.shape[:2], plan.heads, plan.value_dim)), output_dtype(q, k, v), by_row=False)
    _run(
        "forward", plan, np.array([*plan.describe_inputs(q, k, v, f), y.row]), plan.sizes(weight.shape[0]),
        plan.padded_weight(weight), plan.dense(initial_state), final, saved,
    )  # fmt: skip
    return y.result(), final, saved


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
    plan = _plan(q, k, v, f, weight, cu_seqlens)
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
    kernel("apply_tanh", 8 * x.itemsize)(_address(padded), _address(out), padded.size)
    return out[: x.size].reshape(x.shape)
