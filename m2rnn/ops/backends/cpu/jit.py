"""How numba compiles the CPU kernels: nothing but machine code, in its own calling convention."""

from typing import Any

from numba import njit, types


def inline(function: Any) -> Any:
    return njit(nogil=True, error_model="numpy", forceinline=True)(function)


def outlined(function: Any) -> Any:
    """Not inlined: compiled once, which halves the time of a first call."""
    return njit(nogil=True, error_model="numpy")(function)


def compile_kernel(function: Any, arguments: str, bits: int) -> tuple[str, str]:
    """LLVM's code of one of ``KERNELS`` for a state of float32 or float64, and the function's name in it.

    The function has numba's own calling convention: see ``code.py``.
    """
    kinds = {
        "n": types.int64,
        "t": types.CPointer(types.int64),
        "x": types.CPointer(types.float32 if bits == 32 else types.float64),
        "d": types.float64,
    }
    signature = tuple(kinds[kind] for kind in arguments)
    kernel = njit(nogil=True, error_model="numpy")(function)
    kernel.compile(signature)
    return kernel.inspect_llvm(signature), kernel.overloads[signature].fndesc.llvm_func_name
