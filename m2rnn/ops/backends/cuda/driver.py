"""The few functions of the CUDA driver that load machine code and launch it, called through ctypes.

A launch passes its arguments as one C struct, and the stream and device are PyTorch's current ones.
"""

import ctypes
from functools import lru_cache

import torch

_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


@lru_cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, what: str) -> None:
    if status != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what} failed: {(text.value or b'unknown error').decode()} (CUDA error {status})")


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


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

    def launch_early(self, blocks: int, arguments: ctypes.Structure, device: torch.device, cluster: int = 1) -> None:
        """Launch in clusters of blocks (compute capability 9.0), which may begin before the kernels ahead have ended.

        The kernel itself waits for them (griddepcontrol.wait), and says when the next one may begin.
        """
        if blocks == 0:
            return
        config = self._config(blocks, torch.cuda.current_stream(device).cuda_stream, cluster)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        status = _driver().cuLaunchKernelEx(ctypes.byref(config), self._kernel, pointers, None)
        _check(status, "launching a CUDA kernel")

    def fits(self, cluster: int, device: int) -> bool:
        """Whether the GPU, the current device, can run a cluster of more than the 8 blocks that every GPU takes."""
        allow = _driver().cuKernelSetAttribute(_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1, self._kernel, device)
        _check(allow, "allowing large clusters")
        config, clusters = self._config(cluster, 0, cluster), ctypes.c_int()
        config.count = 1  # the cluster's dimension alone
        status = _driver().cuOccupancyMaxActiveClusters(ctypes.byref(clusters), self._kernel, ctypes.byref(config))
        return status == 0 and clusters.value > 0

    def _config(self, blocks: int, stream: int, cluster: int) -> _Config:
        attributes = (_Attribute * 2)(
            _Attribute(_CLUSTER_DIMENSION, 0, (cluster, 1, 1)), _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,))
        )
        return _Config((blocks, 1, 1), (self.threads, 1, 1), self.shared_bytes, stream, attributes, len(attributes))
