"""Machine code of the CPU kernels: compiled once, kept on disk, and loaded without numba.

Importing numba and filling its tables takes half a second, of which a process whose kernels are on disk needs nothing:
LLVM, which numba brings along, loads an object file by itself.
"""

import ctypes
import importlib
import importlib.metadata
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from m2rnn.ops.backends.cache import compiled
from m2rnn.ops.backends.cpu.layout import KERNELS

_HERE = Path(__file__).parent
_SOURCES = sorted([*_HERE.glob("*.py"), *_HERE.parents[1].glob("*/cpu_kernels.py")])  # of what is compiled
_CTYPES = {"n": ctypes.c_int64, "t": ctypes.c_void_p, "x": ctypes.c_void_p, "d": ctypes.c_double}
_COMPILING = threading.Lock()  # else threads that come first together compile the same, each for itself


@lru_cache
def kernel(name: str, bits: int) -> Callable[..., None]:
    """One of ``KERNELS`` for a state of float32 or float64 numbers; arrays are passed as addresses."""
    with _COMPILING:
        code = compiled("cpu", f"{name}-{bits}", _key(), lambda: _compile(name, bits))
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
    # numba's calling convention: where to put the result and an exception, then the arguments; it returns a status
    signature = [ctypes.c_void_p, ctypes.c_void_p, *(_CTYPES[kind] for kind in KERNELS[name][1])]
    function = ctypes.CFUNCTYPE(ctypes.c_int32, *signature)(engine.get_function_address("kernel"))
    result, exception = ctypes.c_void_p(), ctypes.c_void_p()
    places = ctypes.addressof(result), ctypes.addressof(exception)

    def call(*arguments: Any) -> None:
        status = function(*places, *arguments)
        assert status == 0, (name, status, engine, result, exception)  # names what must live as long as the function

    return call


def _target_machine() -> Any:
    """A new one: an engine owns its own, and frees it."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=_features(), opt=3, codemodel="jitdefault", jit=True
    )


def _features() -> str:
    try:
        return str(llvm.get_host_cpu_features().flatten())
    except RuntimeError:  # LLVM does not know how to ask this processor
        return ""


def _compile(name: str, bits: int) -> bytes:
    """The object file of a kernel, which calls nothing but C's own library."""
    from m2rnn.ops.backends.cpu.jit import compile_kernel

    source, arguments = KERNELS[name]
    text, function = compile_kernel(getattr(importlib.import_module(f"m2rnn.ops.{source}"), name), arguments, bits)
    module = llvm.parse_assembly(text)
    module.get_function(function).name = "kernel"
    for other in module.functions:  # numba's wrappers for Python go
        if not other.is_declaration and other.name != "kernel":
            other.linkage = "internal"
    passes, machine = llvm.create_new_module_pass_manager(), _target_machine()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    return bytes(machine.emit_object(module))


def _key() -> str:
    """This very source, compiler and processor."""
    versions = [importlib.metadata.version("numba"), importlib.metadata.version("llvmlite")]
    machine = [llvm.get_process_triple(), llvm.get_host_cpu_name(), _features()]
    return "\0".join([*versions, *machine, *(path.read_text(encoding="utf-8") for path in _SOURCES)])
