"""How the benchmark measures: times of several functions in turns, and the memory that one of them adds."""

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from m2rnn.bench.contenders import CONTENDERS, PASSES, Shape

SLEEP_CYCLES = 3_000_000  # 1.5 ms: what the launches of a backward pass under autograd take a slow host
CACHE_BYTES = 256 << 20  # more than any GPU's cache
SLOW_SECONDS = 1.0  # a call that takes longer is timed once

Call = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How often to measure: at least and at most so many times, and between these until so many seconds are spent."""

    least: int
    most: int
    seconds: float


@dataclass
class Timing:
    """What was measured of one function."""

    first_call: float
    extra_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)
    clocks: list[float] = field(default_factory=list)  # of the GPU, in Hz

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def enough(self, effort: Effort) -> bool:
        if self.seconds and self.seconds[-1] > SLOW_SECONDS:
            return True
        count = len(self.seconds)
        return count >= effort.most or (count >= effort.least and sum(self.seconds) > effort.seconds)


class Stopwatch:
    """Times calls on a device, in seconds.

    On a GPU: events around the call, with the cache cold. A kernel that sleeps a known number of cycles goes before it.
    It gives the host a head start, so that launches are not timed, and its duration tells the clock.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        if self.on_gpu:
            self._cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def host(self, call: Call) -> float:
        """Seconds from before the call until its work is done, launches included."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def from_idle(self, call: Call) -> Call:
        """The call, begun when the device is idle: its launches are timed too, whatever the head start."""
        return lambda: self.host(call)

    def once(self, call: Call, timing: Timing) -> None:
        """Add one measurement to ``timing``."""
        if not self.on_gpu:
            timing.seconds.append(self.host(call))
            return
        start, awake, end = self._events
        self._cache.zero_()
        start.record()
        torch.cuda._sleep(SLEEP_CYCLES)
        awake.record()
        call()
        end.record()
        torch.cuda.synchronize()
        timing.seconds.append(awake.elapsed_time(end) / 1e3)
        timing.clocks.append(SLEEP_CYCLES / (start.elapsed_time(awake) / 1e3))


def warm_up(call: Call, stopwatch: Stopwatch) -> Timing:
    """Run it, which compiles it; on a GPU once more, for the memory that it adds. A slow call is timed thereby."""
    timing = Timing(first_call=stopwatch.host(call))
    if not stopwatch.on_gpu:
        return timing
    results: list[object] = []
    trial = Timing(timing.first_call)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stopwatch.once(lambda: results.append(call()), trial)
    added = torch.cuda.max_memory_allocated() - before
    if isinstance(results[0], list):
        trial.extra_bytes = max(0, added - result_bytes(results[0]))
    if trial.seconds[0] <= SLOW_SECONDS:
        trial.seconds, trial.clocks = [], []
    return trial


def result_bytes(results: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in results)


def in_turns(
    calls: Mapping[str, Call], timings: Mapping[str, Timing], effort: Effort, stopwatch: Stopwatch
) -> set[str]:
    """Time each call again and again, one after the other: a change of the clock meets all of them.

    Returns those for which there was too little memory beside the others' inputs.
    """
    failed: set[str] = set()
    while missing := [name for name in calls if name not in failed and not timings[name].enough(effort)]:
        for name in missing:
            try:
                stopwatch.once(calls[name], timings[name])
            except torch.OutOfMemoryError:
                failed.add(name)
    return failed


# ------------------------------------------------------------------------------------ memory on a CPU, in a process


def memory_in_child(contender: str, shape: Shape) -> int:
    """Bytes by which a forward and backward pass raises a fresh process's peak, less its results.

    Raises RuntimeError where that process fails: for want of memory, or of Linux's /proc.
    """
    command = [sys.executable, "-m", __name__, contender, str(shape), str(torch.get_num_threads())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(last or f"its process ended with status {done.returncode}")
    return int(done.stdout.split()[-1])


def peak_bytes() -> int:
    """The largest memory of this process's life."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def extra_peak_bytes(contender: str, shape: Shape) -> int:
    """What ``memory_in_child`` returns, if nothing large ran in this process before."""
    run, tensors = CONTENDERS[contender].run, CONTENDERS[contender].tensors
    warm = Shape(1, min(shape.steps, 40), shape.heads, shape.key_dim, shape.value_dim)
    both = PASSES["forward + backward"]
    both(run, tensors(warm, "cpu", torch.float32))
    problem = tensors(shape, "cpu", torch.float32)
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    # The peak is that of the whole life so far: fill up to it, and only growth is left to see.
    ballast = torch.ones(max(0, peak_bytes() - resident) // 4 + 1)
    before = peak_bytes()
    results = both(run, problem)
    added = peak_bytes() - before - result_bytes(results)
    del ballast
    return added


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    sys.stdout.write(f"{extra_peak_bytes(sys.argv[1], Shape.parse(sys.argv[2]))}\n")
