"""Memory beyond inputs, outputs and gradients is O(T/C + C) states: measured in a process of its own."""

import json
import subprocess
import sys

import pytest

from m2rnn.ops import available_backends
from tests.ops.cases import Case, make_problem, run

if not sys.platform.startswith("linux"):
    pytest.skip("reads /proc/self/statm", allow_module_level=True)

BATCH, HEADS, KEY, VALUE = 4, 8, 16, 16
STATE_BYTES = BATCH * HEADS * KEY * VALUE * 4
CHUNK = 64  # the longest that the backend uses
SLACK = 3 << 20  # allocator rounding and small buffers

# The high-water mark is that of the whole life: the process first fills itself up to it, with ballast.
CHILD = """
import json, os, resource, sys
import torch
from m2rnn.ops import m2rnn_scan
from m2rnn.ops.scan import reference

backend, batch, steps, heads, key, value = json.loads(sys.argv[1])
torch.set_num_threads(1)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def problem(steps):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    f = torch.rand(batch, steps, heads, generator=generator)
    q, k, v = (normal(batch, steps, *size) for size in ((1, key), (1, key), (heads, value)))
    inputs = [q, k, v, f, 0.25 * normal(heads, value, value)]
    return [x.requires_grad_() for x in inputs], normal(batch, steps, heads, value)

def infer(inputs, dy):
    with torch.no_grad():
        return m2rnn_scan(*inputs, output_final_state=True, backend=backend)

def train(inputs, dy):
    if backend == "autograd":
        y, state = reference.scan(*inputs)
    else:
        y, state = m2rnn_scan(*inputs, output_final_state=True, state_clip=1.0, backend=backend)
    return y.detach(), state.detach(), *torch.autograd.grad(y, inputs, dy)

def extra(function, inputs, dy):
    ballast = torch.ones(max(0, peak() - resident()) // 4 + 1)
    before = peak()
    results = function(inputs, dy)
    return peak() - before - sum(x.numel() * x.element_size() for x in results)

train(*problem(70))
inputs, dy = problem(steps)
print(json.dumps([0 if backend == "autograd" else extra(infer, inputs, dy), extra(train, inputs, dy)]))
"""


def extra_bytes(backend: str, steps: int) -> tuple[int, int]:
    """Growth of the peak beyond the results: of a forward alone, and of a forward and backward."""
    arguments = json.dumps([backend, BATCH, steps, HEADS, KEY, VALUE])
    child = subprocess.run([sys.executable, "-c", CHILD, arguments], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    infer, train = json.loads(child.stdout.splitlines()[-1])
    return infer, train


@pytest.mark.skipif(available_backends().get("cpu", "no") is not None, reason="the cpu backend does not run here")
def test_cpu_saves_one_state_in_a_chunk() -> None:
    """Training: T/C saved states, C of scratch, as much again for partial sums. Inference: a few."""
    steps = 2048
    infer, train = extra_bytes("cpu", steps)
    bound = 2 * (steps / CHUNK + CHUNK) * STATE_BYTES + SLACK
    every_state = steps * STATE_BYTES
    assert bound < every_state / 3, "the bound would not notice that every state is saved"
    assert train <= bound, f"{train / 2**20:.1f} MiB, bound {bound / 2**20:.1f}, all {every_state / 2**20:.1f}"
    assert infer <= 16 * STATE_BYTES + SLACK, f"{infer / 2**20:.1f} MiB"


@pytest.mark.skipif(available_backends().get("cpu", "no") is not None, reason="the cpu backend does not run here")
def test_cpu_results_hold_no_memory_but_their_own() -> None:
    """What is a sum over parts is not a view of the first, which would keep all of them as long as it lives."""
    problem = make_problem(Case(time=40, key=64, heads=(1, 1, 2, 2, 2)))
    for name, x in run(problem, "cpu").items():
        assert x.untyped_storage().nbytes() == x.nbytes, name


def test_the_measurement_sees_saved_states() -> None:
    """Autograd through the definition keeps several states a step: the measurement must show at least one."""
    steps = 512
    assert extra_bytes("autograd", steps)[1] > steps * STATE_BYTES
