"""A GPU as a launcher sees it: what it has room for, and its kernels.

This is all that a launcher asks of the hardware, so that a test can put an emulated GPU in its place.
"""

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from m2rnn.ops.backends.cuda.compiler import cubin
from m2rnn.ops.backends.cuda.driver import Kernel

Launch = Callable[[int, ctypes.Structure, torch.device], None]  # so many blocks, with these arguments, on this device


class Limits(NamedTuple):
    """By which a launcher plans."""

    multiprocessors: int
    shared_total: int  # bytes of shared memory of a multiprocessor
    shared_limit: int  # bytes of it that a block can have


class Gpu:
    """One of PyTorch's GPUs."""

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        shared_limit = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
        self.device = device
        self.limits = Limits(
            properties.multi_processor_count, properties.shared_memory_per_multiprocessor, shared_limit
        )

    def kernel(self, source: str, macros: tuple[tuple[str, int], ...], threads: int, shared_bytes: int) -> Launch:
        """``m2rnn_<source>`` of ``<source>.cu``, compiled with these macros, for blocks of so many threads."""
        code = cubin(source, macros, torch.cuda.get_device_capability(self.device))
        return Kernel(code, f"m2rnn_{source}", threads, shared_bytes, self.device.index)

    def current(self) -> AbstractContextManager[object]:
        """In which kernels are launched."""
        return torch.cuda.device(self.device)


# Those in use, by the device of their tensors. A test may put an emulated one here, which takes tensors on the CPU.
gpus: dict[torch.device, Gpu] = {}


def gpu_of(device: torch.device) -> Gpu:
    """The GPU that tensors of this device lie on."""
    if device not in gpus:
        gpus[device] = Gpu(device)
    return gpus[device]
