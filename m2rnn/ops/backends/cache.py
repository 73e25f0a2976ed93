"""Compiled code on disk, so that a kernel is compiled once for all processes and backends."""

import hashlib
import os
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path

_DIGEST_BYTES = 32
_warned = False


def compiled(kind: str, name: str, key: str, compile_code: Callable[[], bytes]) -> bytes:
    """The machine code of a kernel: from the cache, or compiled and put there.

    Args:
        kind: the backend, which has a folder of its own in the cache.
        name: the kernel's, with which its file's name begins.
        key: all that the code follows from, as text: source, compiler, processor. Another key is another file.
        compile_code: called where the cache has no such file, or a damaged one.

    The folder is ``M2RNN_CACHE_DIR``; else ``m2rnn`` in ``NUMBA_CACHE_DIR`` (kind "cpu" alone), ``XDG_CACHE_HOME`` or
    ``~/.cache``, the first that is set. If the code cannot be kept, the first time in a process a warning says so.
    """
    file = f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    code = _read(kind, file)
    if code is None:
        code = compile_code()
        _write(kind, file, code)
    return code


def _folder(kind: str) -> Path:
    """Raises RuntimeError for a user without a home, as in a container that runs under a bare number."""
    if chosen := os.environ.get("M2RNN_CACHE_DIR"):
        return Path(chosen).expanduser() / kind
    older = os.environ.get("NUMBA_CACHE_DIR") if kind == "cpu" else None
    shared = older or os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "m2rnn" / kind


def _read(kind: str, file: str) -> bytes | None:
    """The code, unless it is missing, damaged or another user's."""
    try:
        content = (_folder(kind) / file).read_bytes()
    except (OSError, RuntimeError):
        return None
    digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(kind: str, file: str, code: bytes) -> None:
    """Whole or not at all, since other processes may read and write the same file."""
    folder = f"{os.environ.get('M2RNN_CACHE_DIR') or '~/.cache/m2rnn'}/{kind}"  # as a message says it without a home
    try:
        path = _folder(kind) / file
        folder = str(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{file}.{uuid.uuid4().hex}")
        try:
            part.write_bytes(hashlib.sha256(code).digest() + code)
            part.replace(path)
        finally:  # also where the user interrupts
            part.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        _warn(folder, getattr(error, "strerror", None) or str(error))


def _warn(folder: str, reason: str) -> None:
    global _warned
    if _warned:
        return
    _warned = True
    warnings.warn(
        f"m2rnn cannot keep compiled kernels in {folder} ({reason}): every process compiles them anew, which takes some"
        " seconds. Set M2RNN_CACHE_DIR to a folder that can be written.",
        stacklevel=4,
    )
