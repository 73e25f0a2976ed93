"""The few functions of the CUDA driver that load machine code and launch it, called through ctypes.

A launch passes its arguments as one C struct, and the stream and device are PyTorch's current ones.
"""

import ctypes
from functools import lru_cache

import torch

_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@lru_cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, what: str) -> None:
    if status != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what} failed: {(text.value or b'unknown error').decode()} (CUDA error {status})")


class Kernel:
    """A kernel of a cubin, and how to launch it."""

    def __init__(self, code: bytes, name: str, threads: int, shared_bytes: int, device: int):
        self.threads, self.shared_bytes = threads, shared_bytes
        self._library, self._kernel = ctypes.c_void_p(), ctypes.c_void_p()
        driver = _driver()
        load = driver.cuLibraryLoadData(ctypes.byref(self._library), code, None, None, 0, None, None, 0)
        _check(load, f"loading the CUDA kernel {name}")
        _check(driver.cuLibraryGetKernel(ctypes.byref(self._kernel), self._library, name.encode()), f"finding {name}")
        if shared_bytes > 48 * 1024:
            attribute = driver.cuKernelSetAttribute(_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes, self._kernel, device)
            _check(attribute, f"reserving {shared_bytes} bytes of shared memory for {name}")

    def __call__(self, blocks: int, arguments: ctypes.Structure, device: torch.device) -> None:
        """Launch on the current stream of ``device``, which is the current device."""
        if blocks == 0:
            return
        stream = torch.cuda.current_stream(device).cuda_stream
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        status = _driver().cuLaunchKernel(
            self._kernel, blocks, 1, 1, self.threads, 1, 1, self.shared_bytes, ctypes.c_void_p(stream), pointers, None
        )
        _check(status, "launching a CUDA kernel")
