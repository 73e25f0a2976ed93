"""The vector recurrences on a CPU: compiled kernels beside the PyTorch loop and torch.nn.GRU, forward and backward.

    python benchmarks/rnn.py

They take turns; the least of several times is shown, in milliseconds. torch.nn.GRU is timed with as many units in one
matrix as the heads of the first shape have together, and with its input's projection, which it cannot do without.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

PROJECT = str(Path(__file__).resolve().parents[1])
SHAPES = [("gru", 128, 128, 3, 32), ("rnn", 128, 128, 4, 48), ("gru", 8, 512, 85, 16), ("rnn", 8, 512, 85, 16)]


def training_step(kind: str, batch: int, steps: int, heads: int, units: int, backend: str) -> Callable[[], None]:
    """Forward and backward of one scan; for ``"nn.GRU"``, of PyTorch's own GRU of as many units."""
    if backend == "nn.GRU":
        layer = torch.nn.GRU(heads * units, heads * units, batch_first=True)
        x = torch.randn(batch, steps, heads * units, requires_grad=True)
        inputs: list[torch.Tensor] = [x, *layer.parameters()]

        def run() -> torch.Tensor:
            y: torch.Tensor = layer(x)[0]
            return y
    else:
        from m2rnn.ops.vector_scan.operator import gru_scan, rnn_scan

        count, scan = (3, gru_scan) if kind == "gru" else (1, rnn_scan)
        xs = [torch.randn(batch, steps, heads, units, requires_grad=True) for _ in range(count)]
        ws = [(torch.randn(heads, units, units) / units**0.5).requires_grad_() for _ in range(count)]
        inputs = [*xs, *ws]

        def run() -> torch.Tensor:
            y, _ = scan(*inputs, state_clip=1.0, backend=backend)  # type: ignore[operator]
            return y  # type: ignore[no-any-return]

    cotangent = torch.randn_like(run())
    return lambda: torch.autograd.grad(run(), inputs, cotangent) and None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--csv", type=Path, default=Path("rnn.csv"))
    options = parser.parse_args()
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads are at least 1")
    torch.set_num_threads(options.threads)

    sys.path.insert(0, PROJECT)
    from m2rnn.runs.csv_table import write_csv
    from m2rnn.runs.machine import hardware, versions

    machine = hardware("cpu") | versions(("torch", "numba"))
    print(" · ".join(f"{name} {value}" for name, value in machine.items()))
    rows = []
    for shape in SHAPES:
        backends = ["cpu", "reference", *(["nn.GRU"] if shape == SHAPES[0] else [])]
        steps = {backend: training_step(*shape, backend) for backend in backends}
        best = dict.fromkeys(backends, float("inf"))
        for _ in range(options.repeats):
            for backend, step in steps.items():
                start = time.perf_counter()
                step()
                best[backend] = min(best[backend], 1e3 * (time.perf_counter() - start))
        times = "   ".join(f"{backend} {ms:7.1f} ms" for backend, ms in best.items())
        print("{} B {} T {}, {} heads of {}:".format(*shape).ljust(36), times, flush=True)
        for backend, ms in best.items():
            row = dict(zip(("recurrence", "B", "T", "heads", "V"), shape, strict=True))
            rows.append({**row, "backend": backend, "ms": f"{ms:.4g}", **machine})
    write_csv(options.csv, rows)
    print(f"\nwrote {options.csv}")


if __name__ == "__main__":
    main()
