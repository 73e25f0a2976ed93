"""Which backend runs: one pure function of the tensors, the same for every operator."""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from m2rnn.ops.backends import cuda


class Backends(NamedTuple):
    """The backends of an operator. A module of them has ``why_not(problem)`` and is imported when it is asked."""

    operator: str  #: its name in messages
    modules: Mapping[str, str]  #: of each backend
    preferred: Callable[[Any], tuple[str, ...]]  #: for a problem: those of its device, the fastest first

    def module(self, backend: str) -> Any:
        return importlib.import_module(self.modules[backend])

    def check_name(self, backend: str | None) -> None:
        """Raise `ValueError` for a name that is none of these."""
        if backend is not None and backend not in self.modules:
            raise ValueError(f"backend is {backend!r}, expected one of {', '.join(map(repr, self.modules))} or None")

    def why_not(self, backend: str, problem: Any) -> str | None:
        """Why a backend cannot run on a problem's tensors, or None if it can."""
        if (reason := why_unavailable(backend)) is not None or problem.device.type == "meta":
            return reason
        return self.module(backend).why_not(problem)  # type: ignore[no-any-return]

    def choose(self, backend: str | None, problem: Any) -> str:
        """``backend`` if it can run, else an error; for None the fastest that can, with a warning if others cannot."""
        if backend is not None:
            if (reason := self.why_not(backend, problem)) is not None:
                raise ValueError(f"backend={backend!r} cannot run: {reason}")
            return backend
        device, reasons = problem.device.type, []
        for name in self.preferred(problem):
            if (reason := self.why_not(name, problem)) is None:
                break
            reasons.append(reason)
        else:
            name = "reference"
            reasons = list(dict.fromkeys(reasons)) or [f"there is no kernel for {device}"]
        if reasons:
            _warn_fallback(self.operator, name, device, "; ".join(reasons))
        return name


@lru_cache
def why_unavailable(backend: str) -> str | None:
    """Why a backend cannot run on this machine, or None if it can."""
    match backend:
        case "cpu":
            return None if importlib.util.find_spec("numba") else "numba is not installed: pip install numba"
        case "triton":
            if importlib.util.find_spec("triton") is None:
                return "triton is not installed: pip install triton"
            return None if triton_is_interpreted() or torch.cuda.is_available() else "no GPU that PyTorch can use"
        case "cuda":
            return cuda.why_unavailable()
    return None


def triton_is_interpreted() -> bool:
    """Triton's own switch, which it reads when it is imported: kernels run in Python, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_on_device(backend: str, device: torch.device) -> str | None:
    """Why a backend's kernels cannot run on tensors of a device, or None if they can."""
    match backend, device.type:
        case ("cpu", "cpu") | ("triton", "cuda") | ("cuda", "cuda"):
            return None
        case ("triton", "cpu") if triton_is_interpreted():
            return None
    return f"the tensors are on {device.type}"


@lru_cache
def _warn_fallback(operator: str, backend: str, device: str, reason: str) -> None:
    """Warns once for each reason: the cache remembers."""
    what = "the slow reference loop" if backend == "reference" else f"its {backend} kernels, not the fastest,"
    warnings.warn(f"{operator} runs {what} on {device} tensors: {reason}", stacklevel=5)
