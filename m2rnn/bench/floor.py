"""The least time a problem can take on a device: counts of what must be done, over the device's peak rates.

    floor = max(special functions / their rate, multiply-adds / their rate, bytes / bandwidth)

On a GPU the rates follow from its properties, at its highest clock, which it does not hold under every load:

- special functions (tanh, exp): 16 per clock and multiprocessor;
- multiply-adds of bf16 matrices on the tensor cores: ``MATRIX_RATES`` per clock and multiprocessor;
- bytes: memory clock × bus width × 2 transfers per clock.

On a CPU the multiply-adds alone count, at the rate that a large float32 matrix product reaches there.

A floor knows no latency: a recurrence of T steps takes T times the latency of one step at the least, which is more
than the floor where the batch is small.
"""

import ctypes
import time
from dataclasses import dataclass
from typing import Protocol

import torch

SPECIAL_RATE = 16
# bf16 multiply-adds per clock and multiprocessor, dense, float32 accumulators (NVIDIA's architecture white papers).
MATRIX_RATES = {(8, 0): 1024, (8, 6): 512, (8, 9): 512, (9, 0): 2048, (10, 0): 4096, (12, 0): 512}
GATE_BYTES = WEIGHT_BYTES = STATE_BYTES = 4  # f, W and the state are float32 in the model


class Problem(Protocol):
    """Sizes of a scan; see ``Shape``."""

    @property
    def batch(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def key_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...


@dataclass(frozen=True)
class Counts:
    """What a problem must do at least."""

    special: int
    multiply_adds: int
    bytes: int


@dataclass(frozen=True)
class Peaks:
    """What a device can do in a second; None where that is not known."""

    special: float | None
    multiply_adds: float | None
    bytes: float | None


def floor(counts: Counts, peaks: Peaks) -> tuple[float, str] | None:
    """The floor in seconds and what sets it, or None if no rate of the device is known."""
    times = {
        "special functions": (counts.special, peaks.special),
        "multiply-adds": (counts.multiply_adds, peaks.multiply_adds),
        "bytes": (counts.bytes, peaks.bytes),
    }
    known = [(count / rate, name) for name, (count, rate) in times.items() if rate]
    return max(known) if known else None


def scan_counts(problem: Problem, backward: bool, item: int) -> Counts:
    """Counts of ``m2rnn_scan`` with one q and one k head, ``item`` bytes an element of q, k, v and y.

    Forward, for each of the B·T·N·K·V elements of the states: one tanh; V multiply-adds for H W, one each for k vᵀ
    and Hᵀq. Inputs are read and y is written.

    Backward, for each element: one tanh, since Z is recomputed, not stored; V + 1 multiply-adds for that, 2 V for dX Wᵀ
    and HᵀdX, one each for q dyᵀ, dk, dv and dq. Inputs and dy are read, gradients of the inputs written.
    """
    tokens = problem.batch * problem.steps
    values = problem.heads * problem.value_dim
    elements = tokens * problem.key_dim * values
    inputs = tokens * ((2 * problem.key_dim + values) * item + problem.heads * GATE_BYTES)
    inputs += values * problem.value_dim * WEIGHT_BYTES
    outputs = tokens * values * item
    ahead = Counts(elements, elements * (problem.value_dim + 2), inputs + outputs)
    if not backward:
        return ahead
    return Counts(
        2 * elements,
        ahead.multiply_adds + elements * (3 * problem.value_dim + 5),
        ahead.bytes + inputs + outputs + inputs,
    )


def step_counts(problem: Problem, item: int) -> Counts:
    """Counts of ``m2rnn_step``: a scan of one token that reads and writes the state."""
    ahead = scan_counts(problem, False, item)
    state = problem.batch * problem.heads * problem.key_dim * problem.value_dim * STATE_BYTES
    return Counts(ahead.special, ahead.multiply_adds, ahead.bytes + 2 * state)


def attention_counts(batch: int, steps: int, heads: int, head_dim: int, backward: bool, item: int) -> Counts:
    """Counts of causal attention: for each query and key one exp, and two products forward, five backward.

    The backward pass recomputes the exp.
    """
    pairs = batch * heads * steps * (steps + 1) // 2
    tensor = batch * steps * heads * head_dim * item
    if backward:
        return Counts(2 * pairs, 7 * pairs * head_dim, 12 * tensor)  # q, k, v, y; the same and dy; dq, dk, dv
    return Counts(pairs, 2 * pairs * head_dim, 4 * tensor)


@dataclass(frozen=True)
class GPU:
    """The properties of a GPU that its floors follow from; clocks in Hz."""

    multiprocessors: int
    clock: float
    memory_clock: float
    bus_bits: int
    capability: tuple[int, int]

    @property
    def peaks(self) -> Peaks:
        clocks = self.multiprocessors * self.clock
        matrix = MATRIX_RATES.get(self.capability)
        return Peaks(
            special=SPECIAL_RATE * clocks,
            multiply_adds=None if matrix is None else matrix * clocks,
            bytes=self.memory_clock * self.bus_bits / 8 * 2,
        )


def current_gpu() -> GPU | None:
    """The current GPU's properties from its driver; None if it is not NVIDIA's."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    index = torch.cuda.current_device()
    clock_rate, multiprocessors, memory_clock_rate, bus_width = 13, 16, 36, 37  # CU_DEVICE_ATTRIBUTE_…, rates in kHz

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, index)
        return value.value

    return GPU(
        multiprocessors=attribute(multiprocessors),
        clock=1e3 * attribute(clock_rate),
        memory_clock=1e3 * attribute(memory_clock_rate),
        bus_bits=attribute(bus_width),
        capability=torch.cuda.get_device_capability(index),
    )


def cpu_peaks() -> Peaks:
    """The rate of a large float32 matrix product on the threads in use: the fastest of a few."""
    a = torch.randn(1024, 1024)
    times = []
    for _ in range(15):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return Peaks(special=None, multiply_adds=1024**3 / min(times), bytes=None)
