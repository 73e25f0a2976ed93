"""CUDA C++ to machine code: NVRTC through cuda-core, once for each source, set of macros and architecture on a disk."""

import importlib.metadata
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from m2rnn.ops.backends.cache import compiled

_OPS = Path(__file__).parents[2]


def cubin(name: str, macros: tuple[tuple[str, int], ...], capability: tuple[int, int]) -> bytes:
    """Machine code of ``<name>.cu`` with these macros, for GPUs of this compute capability."""
    # sm_90a has Hopper's own instructions; code for other architectures must run on later ones of the same family
    options = {
        "arch": f"sm_{capability[0]}{capability[1]}",
        "std": "c++17",
        "define_macro": [(macro, str(value)) for macro, value in macros],
    }
    source = source_of(f"{name}.cu")
    return compiled("cuda", name, repr((source, options, _versions())), lambda: _compile(source, options))


def source_of(file: str) -> str:
    """The text of a CUDA source of any operator, with those that it includes put in."""
    include = re.compile(r'^#include "(.+)"$', re.MULTILINE)
    return include.sub(lambda found: source_of(found[1]), _found(file).read_text())


@lru_cache
def _found(file: str) -> Path:
    """Sources lie with their operators, and their names are unique."""
    (path,) = _OPS.glob(f"*/cuda/{file}")
    return path


def _compile(source: str, options: dict[str, Any]) -> bytes:
    from cuda.core import Program, ProgramOptions

    return bytes(Program(source, "c++", ProgramOptions(**options)).compile("cubin").code)


@lru_cache
def _versions() -> tuple[str, ...]:
    """Of what turns the source into machine code."""
    return tuple(
        f"{package} {importlib.metadata.version(package)}"
        for package in ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")
        if _installed(package)
    )


def _installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
