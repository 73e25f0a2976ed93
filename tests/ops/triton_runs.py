"""Where Triton's kernels run in this test run: on a GPU, in its interpreter, or nowhere."""

import importlib.metadata

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

interpreted = pytest.mark.skipif(bool(WHY_NOT_INTERPRETED), reason=WHY_NOT_INTERPRETED)
runs_triton = pytest.mark.skipif(not GPU and bool(WHY_NOT_INTERPRETED), reason=f"no GPU, and {WHY_NOT_INTERPRETED}")
