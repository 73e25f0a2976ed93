"""How long until the operator answers: import, and the first call and gradient with cold and warm caches.

    python benchmarks/start_up.py
    python benchmarks/start_up.py --backend cuda

Each run is a process of its own; the median of several, except for the cold cache, which is there only once. On a
GPU the first call begins when the GPU runs: what PyTorch itself needs to start it is not counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = str(Path(__file__).resolve().parents[1])
RUN = """
import json, sys, time
start = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - start
start = time.perf_counter()
import m2rnn
from m2rnn import ops
library_seconds = time.perf_counter() - start
backend, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
on_gpu = backend != "cpu"
torch.set_default_device("cuda" if on_gpu else "cpu")
normal = torch.randn
inputs = [normal(2, 64, 1, 64), normal(2, 64, 1, 64), normal(2, 64, 2, 16), torch.rand(2, 64, 2), normal(2, 16, 16)]
if on_gpu:
    inputs[:3] = [x.bfloat16() for x in inputs[:3]]
    torch.cuda.synchronize()
start = time.perf_counter()
y, _ = ops.m2rnn_scan(*(x.requires_grad_() for x in inputs), state_clip=1.0, backend=backend)
y.sum().backward()
if on_gpu:
    torch.cuda.synchronize()
print(json.dumps([torch_seconds, library_seconds, time.perf_counter() - start]))
"""


def start_up(backend: str, threads: int, repeats: int) -> dict[str, float]:
    """Seconds to import torch, to import m2rnn after it, and of the first call and gradient."""
    with tempfile.TemporaryDirectory() as cache:
        caches = dict.fromkeys(("M2RNN_CACHE_DIR", "TRITON_CACHE_DIR"), cache)
        environment = {**os.environ, "PYTHONPATH": PROJECT, **caches}
        command = [sys.executable, "-c", RUN, backend, str(threads)]
        runs = []
        for _ in range(repeats + 1):
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    middle = [statistics.median(column) for column in zip(*runs[1:], strict=True)]
    return {
        "import torch": middle[0],
        "import m2rnn after torch": middle[1],
        "first call and gradient, cold cache": runs[0][2],
        "first call and gradient, warm cache": middle[2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cpu", choices=["cpu", "triton", "cuda"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=Path("start_up.csv"))
    options = parser.parse_args()
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads are at least 1")

    sys.path.insert(0, PROJECT)
    from m2rnn.runs.csv_table import write_csv
    from m2rnn.runs.machine import hardware, versions

    device = "cpu" if options.backend == "cpu" else "cuda"
    machine = {"backend": options.backend, **hardware(device), "threads": options.threads}
    machine |= versions(("torch", "numba", "triton", "cuda-core"))
    print(" · ".join(f"{name} {value}" for name, value in machine.items()))
    seconds = start_up(options.backend, options.threads, options.repeats)
    for what, value in seconds.items():
        print(f"{what:38} {value:7.3f} s")
    write_csv(options.csv, [{"what": what, "seconds": f"{x:.4g}", **machine} for what, x in seconds.items()])
    print(f"\nwrote {options.csv}")


if __name__ == "__main__":
    main()
