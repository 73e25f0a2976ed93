"""Where Triton's kernels run in this test run: on a GPU, in its interpreter, or nowhere."""

import importlib.metadata
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import INTERPRETED

GPU = torch.cuda.is_available() and not INTERPRETED


def _version(package: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))
    except importlib.metadata.PackageNotFoundError:
        return (0, 0)


if not INTERPRETED:
    WHY_NOT_INTERPRETED = "there is a GPU"
elif _version("triton") == (0, 0):
    WHY_NOT_INTERPRETED = "Triton is not installed"
elif _version("triton") < (3, 7) and _version("numpy") >= (2, 4):
    WHY_NOT_INTERPRETED = "the interpreter of Triton before 3.7 does not work with NumPy 2.4"
else:
    WHY_NOT_INTERPRETED = ""

if not WHY_NOT_INTERPRETED and _version("triton") == (3, 9):
    from triton.runtime import interpreter

    def _splat(self: Any, of: Any, scalar: Any) -> Any:
        """Triton 3.9's own gives a comparison's result the dtype of what is compared: masks that it refuses later."""
        data = np.full(of.shape, scalar.data, scalar.data.dtype)
        return interpreter.TensorHandle(data, scalar.dtype.scalar)

    interpreter.InterpreterBuilder.create_splat = _splat

interpreted = pytest.mark.skipif(bool(WHY_NOT_INTERPRETED), reason=WHY_NOT_INTERPRETED)
runs_triton = pytest.mark.skipif(not GPU and bool(WHY_NOT_INTERPRETED), reason=f"no GPU, and {WHY_NOT_INTERPRETED}")
