"""CUDA C++ to machine code: NVRTC through cuda-core, once for each source, set of macros and architecture on a disk."""

import contextlib
import hashlib
import importlib.metadata
import os
import re
import tempfile
import uuid
import warnings
from functools import lru_cache
from pathlib import Path

_OPS = Path(__file__).parents[2]


def cubin(name: str, macros: tuple[tuple[str, int], ...], capability: tuple[int, int]) -> bytes:
    """Machine code of ``<name>.cu`` with these macros, for GPUs of this compute capability."""
    source = source_of(f"{name}.cu")
    # sm_90a has Hopper's own instructions; code for other architectures must run on later ones of the same family
    architecture = f"sm_{capability[0]}{capability[1]}"
    key = repr((source, macros, architecture, _versions()))
    folder = _cache_folder()
    path = None if folder is None else folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cubin"
    if path is not None:
        with contextlib.suppress(OSError):  # it is not there, or another user's
            return path.read_bytes()
    code = _compile(source, macros, architecture)
    if path is not None:
        _write(path, code)
    return code


def _write(path: Path, code: bytes) -> None:
    """Whole or not at all, since other processes may read and write the same file."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        part.write_bytes(code)
        part.replace(path)
    except OSError as error:  # the disk is full, or the user's share of it
        with contextlib.suppress(OSError):
            part.unlink()
        _warn(path.parent, error)


def source_of(file: str) -> str:
    """The text of a CUDA source of any operator, with those that it includes put in."""
    include = re.compile(r'^#include "(.+)"$', re.MULTILINE)
    return include.sub(lambda found: source_of(found[1]), _found(file).read_text())


@lru_cache
def _found(file: str) -> Path:
    """Sources lie with their operators, and their names are unique."""
    (path,) = _OPS.glob(f"*/cuda/{file}")
    return path


def _compile(source: str, macros: tuple[tuple[str, int], ...], architecture: str) -> bytes:
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        arch=architecture,
        std="c++17",
        define_macro=[(macro, str(value)) for macro, value in macros],
    )
    return bytes(Program(source, "c++", options).compile("cubin").code)


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


@lru_cache
def _cache_folder() -> Path | None:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m2rnn" / "cuda"
    except RuntimeError as error:  # a user without a home, as in a container that runs under a bare number
        _warn("~/.cache/m2rnn/cuda", error)
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        _warn(folder, error)
        return None


def _warn(folder: Path | str, error: Exception) -> None:
    warnings.warn(
        f"cannot write compiled CUDA kernels to {folder} ({error}): every process compiles them anew, which takes"
        " some seconds. Set XDG_CACHE_HOME to a folder that can be written.",
        stacklevel=3,
    )
