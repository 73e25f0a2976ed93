"""Before the first result: imports stay light, kernels load without a compiler, slow choices are announced."""

import os
import subprocess
import sys

import pytest

from m2rnn.ops import available_backends

needs_cpu = pytest.mark.skipif(
    available_backends().get("cpu", "no") is not None, reason="the cpu backend does not run here"
)

PROBLEM = """
import sys, warnings
import torch
torch.set_num_threads(1)
from m2rnn.ops import available_backends, m2rnn_scan
inputs = [torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 2), torch.full((1, 3, 1), 0.5)]
inputs.append(torch.eye(2)[None])
"""


def _child(script: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", PROBLEM + script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr


def test_import_leaves_heavy_libraries_alone_and_numba_may_be_missing() -> None:
    """One process: a light import; without numba the reference runs, says so once, and "cpu" is refused."""
    _child("""
heavy = {"numba", "transformers", "llvmlite"} & set(sys.modules)
assert not heavy, f"import m2rnn.ops imports {heavy}"

sys.modules["numba"] = None
assert "numba" in available_backends()["cpu"]
assert available_backends()["reference"] is None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        y, _ = m2rnn_scan(*inputs)
messages = [str(w.message) for w in caught]
assert len(messages) == 1 and "reference" in messages[0] and "numba" in messages[0], messages
expected, _ = m2rnn_scan(*inputs, backend="reference")
assert torch.equal(y, expected)
try:
    m2rnn_scan(*inputs, backend="cpu")
except ValueError as error:
    assert "numba" in str(error), error
else:
    raise AssertionError("backend='cpu' ran without numba")
""")


@needs_cpu
def test_warm_start_imports_no_compiler() -> None:
    """The next process loads its kernels from the cache: it needs neither numba nor torch's own compiler."""
    from m2rnn.ops.backends.cpu import code as cpu_code

    for name in ("forward", "backward"):
        cpu_code.kernel(name, 32)
    _child("""
for x in inputs:
    x.requires_grad_()
y, _ = m2rnn_scan(*inputs, backend="cpu")
y.sum().backward()
compilers = {"numba", "torch._dynamo"} & set(sys.modules)
assert not compilers, compilers
""")


@needs_cpu
def test_threads_may_be_the_first_to_use_a_kernel_together() -> None:
    """Each may load one, of which one is kept: those that are dropped take nothing of the others with them."""
    _child("""
import gc, threading
import numpy as np
from m2rnn.ops.scan import cpu
started = threading.Barrier(8)
right = []
def work(dtype):
    x = np.linspace(-3, 3, 100, dtype=dtype)
    started.wait()
    right.append(np.allclose(cpu.tanh(x), np.tanh(x), rtol=1e-5))
threads = [threading.Thread(target=work, args=(dtype,)) for dtype in (np.float32, np.float64) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
gc.collect()
assert right == [True] * 8, right
m2rnn_scan(*inputs, backend="cpu")
""")


@needs_cpu
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_may_be_the_first_to_use_the_kernels() -> None:
    """Only the parent ran PyTorch's OpenMP threads, which do not survive the fork: the child would wait forever."""
    _child("""
import os, time
torch.set_num_threads(2)
torch.ones(1000, 1000).sin()
child = os.fork()
if child == 0:
    with torch.no_grad():
        m2rnn_scan(*(x.repeat(4, *[1] * (x.dim() - 1)) for x in inputs[:4]), inputs[4], backend="cpu")
    os._exit(0)
for _ in range(600):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        break
    time.sleep(0.1)
else:
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")
assert status == 0, status
""")
