"""The operator on the CPU: compiled kernels against the reference loop: time, memory, start-up.

    python benchmarks/scan.py                        # the shapes of the README
    python benchmarks/scan.py --shape 4,1024,8,16,16 --threads 2 --csv scan.csv

Each time is the median over repeats after a warm-up; the backends take turns within one process, so
that a change of the machine's speed meets all of them. Memory is the growth of the process's peak over
one forward and backward pass, less its results, in a process of its own. The floor is the time that the
multiplications and additions alone take at the speed of a large matrix product on the same threads.
"""

import argparse
import csv
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = [(8, 512, 8, 16, 16), (128, 128, 4, 8, 32)]
BACKENDS = ["reference", "cpu"]
PROJECT = str(Path(__file__).resolve().parents[1])


def make_inputs(shape: tuple[int, ...], dtype: Any) -> tuple[list[Any], Any]:
    """q, k with one head; v, f, W with all: the paper's heads; and a gradient for y."""
    import torch

    batch, steps, heads, key, value = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Any:
        return torch.randn(*size, generator=generator)

    inputs = [
        normal(batch, steps, 1, key),
        normal(batch, steps, 1, key),
        normal(batch, steps, heads, value),
        torch.rand(batch, steps, heads, generator=generator),
        normal(heads, value, value) / value**0.5,
    ]
    return [x.to(dtype).requires_grad_() for x in inputs], normal(batch, steps, heads, value).to(dtype)


def implementation(backend: str) -> Callable[..., Any]:
    """The reference loop is the definition under autograd, not the operator's own reference backend."""
    from m2rnn.ops import m2rnn_scan, reference

    if backend == "reference":
        return lambda *inputs: reference.scan(*inputs)[0]
    return lambda *inputs: m2rnn_scan(*inputs, backend=backend)[0]


def forward(backend: str, inputs: list[Any], dy: Any) -> Any:
    import torch

    with torch.no_grad():
        return implementation(backend)(*inputs)


def forward_backward(backend: str, inputs: list[Any], dy: Any) -> Any:
    import torch

    y = implementation(backend)(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def flops(shape: tuple[int, ...], backward: bool) -> int:
    """Multiplications and additions of the equations; a tanh is not counted, nor is recomputation."""
    batch, steps, heads, key, value = shape
    rows = batch * steps * heads * key
    ahead = rows * value * (2 * value + 2 + 4 + 2)  # H W, + k vᵀ, blend, y
    back = rows * value * (2 * 2 * value + 2 + 4 + 2 + 2 * 4)  # dX Wᵀ and Hᵀ dX; q dyᵀ, dX, f G; dq, dk, dv, df
    return ahead + back if backward else ahead


def flops_a_second() -> float:
    """What a float32 matrix product reaches on the threads in use."""
    import torch

    a = torch.randn(1024, 1024)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)


def timings(shape: tuple[int, ...], dtype: Any, repeats: int) -> dict[tuple[str, str], list[float]]:
    """Seconds by (backend, pass). In turns; a slow backend gets fewer of them, at least three."""
    inputs, dy = make_inputs(shape, dtype)
    passes = {"forward": forward, "forward + backward": forward_backward}
    seconds: dict[tuple[str, str], list[float]] = {(b, p): [] for p in passes for b in BACKENDS}
    for backend, name in seconds:
        passes[name](backend, inputs, dy)
    for turn in range(repeats):
        for (backend, name), measured in seconds.items():
            if turn >= 3 and sum(measured) > 10:
                continue
            start = time.perf_counter()
            passes[name](backend, inputs, dy)
            measured.append(time.perf_counter() - start)
    return seconds


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_memory(backend: str, shape: tuple[int, ...], dtype: str, threads: int) -> None:
    """In a child: print the bytes by which one forward and backward raises the peak, less its results."""
    import torch

    torch.set_num_threads(threads)
    warm = (1, min(shape[1], 40), *shape[2:])
    forward_backward(backend, *make_inputs(warm, getattr(torch, dtype)))
    inputs, dy = make_inputs(shape, getattr(torch, dtype))
    ballast = []  # the peak is that of the whole life so far: fill up to it, and only growth is left to see
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    ballast.append(torch.ones(max(0, _peak() - resident) // 4 + 1))
    before = _peak()
    results = forward_backward(backend, inputs, dy)
    print(_peak() - before - sum(x.numel() * x.element_size() for x in results))


START_UP = """
import json, sys, time
start = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - start
start = time.perf_counter()
import m2rnn
from m2rnn import ops
library_seconds = time.perf_counter() - start
torch.set_num_threads(int(sys.argv[1]))
normal = torch.randn
inputs = [normal(2, 9, 1, 4), normal(2, 9, 1, 4), normal(2, 9, 2, 16), torch.rand(2, 9, 2), normal(2, 16, 16)]
start = time.perf_counter()
y, _ = ops.m2rnn_scan(*(x.requires_grad_() for x in inputs), backend="cpu")
y.sum().backward()
print(json.dumps([torch_seconds, library_seconds, time.perf_counter() - start]))
"""


def _child(arguments: list[str], **environment: str) -> str:
    environment = {**os.environ, "PYTHONPATH": PROJECT, **environment}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()[-1]


def start_up(threads: int, repeats: int) -> dict[str, float]:
    """Seconds to import torch, to import m2rnn after it, and of the first call and gradient."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["-c", START_UP, str(threads)]
        runs = [json.loads(_child(command, NUMBA_CACHE_DIR=folder)) for _ in range(repeats + 1)]
    middle = [statistics.median(column) for column in zip(*runs[1:], strict=True)]
    return {
        "import torch": middle[0],
        "import m2rnn after torch": middle[1],
        "first call and gradient, cold cache": runs[0][2],
        "first call and gradient, warm cache": middle[2],
    }


def machine(threads: int) -> dict[str, Any]:
    import numba
    import torch

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
    }


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Whole or not at all: a reader never sees half a table."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    names = list(dict.fromkeys(name for row in rows for name in row))
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)


def measure(shape: tuple[int, ...], dtype: str, threads: int, repeats: int, speed: float) -> list[dict[str, Any]]:
    """Rows of the table for one shape; printed as they come."""
    import torch

    title = " ".join(f"{letter}{n}" for letter, n in zip("BTNKV", shape, strict=True))
    seconds = timings(shape, getattr(torch, dtype), repeats)
    memory = {
        backend: int(_child([__file__, "--memory", backend, *map(str, shape), dtype, str(threads)]))
        for backend in BACKENDS
    }
    rows = []
    for (backend, name), measured in seconds.items():
        median = statistics.median(measured)
        slow = statistics.median(seconds["reference", name])
        floor = flops(shape, backward="backward" in name) / speed
        row = {
            "shape": title,
            "dtype": dtype,
            "pass": name,
            "backend": backend,
            "median_ms": round(1e3 * median, 3),
            "fastest_ms": round(1e3 * min(measured), 3),
            "repeats": len(measured),
            "times_reference": round(slow / median, 2),
            "floor_ms": round(1e3 * floor, 3),
            "times_floor": round(median / floor, 2),
            "extra_MiB": round(memory[backend] / 2**20, 2) if "backward" in name else "",
        }
        rows.append(row)
        print(
            f"{title:22} {name:19} {backend:10} {row['median_ms']:10.2f} ms {row['times_reference']:7.1f}× "
            f"floor {row['floor_ms']:7.2f} ms (×{row['times_floor']:.1f})"
            + (f"  extra {row['extra_MiB']:8.1f} MiB" if row["extra_MiB"] != "" else ""),
            flush=True,
        )
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--memory"]:
        backend, *shape, dtype, threads = sys.argv[2:]
        measure_memory(backend, tuple(map(int, shape)), dtype, int(threads))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", metavar="B,T,N,K,V", help="more shapes; may be repeated")
    parser.add_argument("--only", action="store_true", help="only the shapes given with --shape")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--csv", type=Path, default=Path("scan.csv"))
    options = parser.parse_args()
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads are at least 1")
    shapes = [] if options.only else list(SHAPES)
    for text in options.shape or []:
        shape = tuple(map(int, text.split(",")))
        if len(shape) != 5 or min(shape) < 1:
            parser.error(f"--shape {text}: expected five positive integers B,T,N,K,V")
        shapes.append(shape)

    sys.path.insert(0, PROJECT)
    import torch

    torch.set_num_threads(options.threads)
    hardware = machine(options.threads)
    print(" · ".join(f"{key} {value}" for key, value in hardware.items()))
    speed = flops_a_second()
    print(f"matrix product: {speed / 1e9:.0f} GFLOP/s\n")
    rows = []
    for shape in shapes:
        rows += measure(shape, options.dtype, options.threads, options.repeats, speed)
    print()
    for name, value in start_up(options.threads, 3).items():
        print(f"{name:38} {value:7.3f} s")
        rows.append({"pass": name, "median_ms": round(1e3 * value, 1)})
    write_csv(options.csv, [{**row, **hardware, "gflops": round(speed / 1e9, 1)} for row in rows])
    print(f"\nwrote {options.csv}")


if __name__ == "__main__":
    main()
