"""Triton kernels compiled on a machine without a GPU: the interpreter takes more than the compiler does."""

import os
import subprocess
import sys
from pathlib import Path

# What would run is compiled for `capability`, which the script sets, and collected in `kernels`
COMPILER = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

kernels = []
run = JITFunction.run
JITFunction.run = lambda self, *args, warmup, **options: kernels.append(run(self, *args, warmup=True, **options))


class Driver:
    get_current_device = staticmethod(lambda: len(kernels))  # nothing in memory from other targets
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))


triton.runtime.driver.set_active(Driver())
"""


def compile_kernels(script: str, folder: Path) -> None:
    """Run the script after ``COMPILER``, with Triton's cache in the folder."""
    child = subprocess.run(
        [sys.executable, "-c", COMPILER + script],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
