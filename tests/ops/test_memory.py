"""Memory beyond inputs, outputs and gradients is O(T/C + C) states: measured in a process of its own."""

import json
import subprocess
import sys
from typing import Any

import pytest

from m2rnn.ops import available_backends

pytest.importorskip("resource", reason="ru_maxrss is POSIX only")

BATCH, HEADS, KEY, VALUE, CHUNK = 4, 8, 16, 16, 64
STATE_BYTES = BATCH * HEADS * KEY * VALUE * 4

# The high-water mark is that of the whole life: the process first fills itself up to it, with ballast.
CHILD = """
import json, resource, sys
import torch
from m2rnn.ops import m2rnn_scan

backend, batch, steps, heads, key, value, clip, wanted = json.loads(sys.argv[1])
torch.set_num_threads(1)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def resident():
    import os
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def problem(steps):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    f = torch.rand(batch, steps, heads, generator=generator)
    inputs = [normal(batch, steps, 1, key), normal(batch, steps, 1, key), normal(batch, steps, heads, value)]
    inputs += [f, 0.25 * normal(heads, value, value)]
    return [x.requires_grad_() for x in inputs], normal(batch, steps, heads, value)

def go(inputs, dy):
    y, state = m2rnn_scan(*inputs, output_final_state=True, state_clip=clip, backend=backend)
    if not wanted:
        return y.detach(), state.detach()
    return y, state, *torch.autograd.grad(y, inputs, dy)

go(*problem(70))
inputs, dy = problem(steps)
with torch.set_grad_enabled(wanted):
    ballast = [torch.ones(max(0, peak() - resident()) // 4 + 1)]
    before = peak()
    results = go(inputs, dy)
    after = peak()
outputs = sum(x.numel() * x.element_size() for x in results)
print(json.dumps({"extra": after - before - outputs, "outputs": outputs}))
"""


def extra_bytes(backend: str, steps: int, *, clip: float | None = None, gradients: bool = True) -> int:
    """Growth of the peak over one call, beyond its results."""
    arguments: list[Any] = [backend, BATCH, steps, HEADS, KEY, VALUE, clip, gradients]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(arguments)], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    return int(json.loads(child.stdout.splitlines()[-1])["extra"])


SLACK = 3 << 20  # allocator rounding and small buffers


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
@pytest.mark.skipif(
    available_backends().get("cpu", "no") is not None, reason="the cpu backend does not run here"
)
class TestCpuMemory:
    STEPS = 2048

    @pytest.mark.parametrize("clip", [None, 1.0])
    def test_training_saves_one_state_in_a_chunk(self, clip: float | None) -> None:
        """Forward and backward: T/C saved states, C states of scratch, and as much again for partial sums."""
        extra = extra_bytes("cpu", self.STEPS, clip=clip)
        bound = 2 * (self.STEPS / CHUNK + CHUNK) * STATE_BYTES + SLACK
        every_state = self.STEPS * STATE_BYTES
        assert bound < every_state / 5, "the bound would not notice that every state is saved"
        assert extra <= bound, (
            f"{extra / 2**20:.1f} MiB, bound {bound / 2**20:.1f}, all {every_state / 2**20:.1f}"
        )

    def test_inference_saves_nothing(self) -> None:
        """Without gradients the forward pass needs a few states, whatever the length."""
        extra = extra_bytes("cpu", self.STEPS, gradients=False)
        assert extra <= 16 * STATE_BYTES + SLACK, f"{extra / 2**20:.1f} MiB"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_the_measurement_sees_saved_states() -> None:
    """Autograd through the definition keeps several states a step: the measurement must show at least one."""
    steps = 512
    script = CHILD.replace("from m2rnn.ops import m2rnn_scan", "from m2rnn.ops import reference").replace(
        "m2rnn_scan(*inputs, output_final_state=True, state_clip=clip, backend=backend)",
        "reference.scan(*inputs)",
    )
    arguments = ["", BATCH, steps, HEADS, KEY, VALUE, None, True]
    child = subprocess.run(
        [sys.executable, "-c", script, json.dumps(arguments)], capture_output=True, text=True, check=True
    )
    assert json.loads(child.stdout.splitlines()[-1])["extra"] > steps * STATE_BYTES
