"""Work shared among threads: PyTorch's own, where they are GNU's OpenMP, else a pool."""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from m2rnn.ops.backends import IMPORTED_IN  # this module may be imported in a forked process first
from m2rnn.ops.backends.cpu import layout as layout
from m2rnn.ops.backends.cpu.code import kernel

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


def address(x: Tensor | np.ndarray | None) -> int:
    if x is None:
        return 0
    return x.data_ptr() if isinstance(x, Tensor) else x.ctypes.data


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
    tables = [address(x) for x in (units, tensors, sequences, sizes)]
    others = [*(address(x) for x in arrays), *clip]
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
