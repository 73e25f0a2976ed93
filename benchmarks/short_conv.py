"""The short convolution of a layer on a GPU: fused kernels beside PyTorch's convolution, forward and backward.

    python benchmarks/short_conv.py
    python benchmarks/short_conv.py --constant SEGMENT=64 --constant BACKWARD_LOADS=2

One `ShortConv` of width 4 with SiLU, without a state, under bfloat16 autocast as in training: its input is the first
part of a projection's output, the sequences are the rows of a batch, or packed with random lengths. Both take turns;
the median is shown, in milliseconds, beside the time that reading and writing each tensor once takes at the memory's
peak: x and y forward; x and the gradients of y and x backward. Errors are relative, of y and of the gradient of x,
against float64. `--constant` sets a constant of `m2rnn/ops/short_conv_triton.py`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from m2rnn.bench.floor import current_gpu
from m2rnn.bench.measure import Stopwatch, Timing
from m2rnn.layers import Packing, ShortConv, short_conv
from m2rnn.runs.csv_table import write_csv
from m2rnn.runs.machine import hardware, versions

COLUMNS = ["layout", "pass", "fused_ms", "conv1d_ms", "floor_ms", "fused_error", "conv1d_error"]
FUSED = short_conv.is_fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--batch", type=int, default=8, help="rows; packed, sequences on average (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=4096, help="of a row (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=1472, help="default: %(default)s, the 410M M2RNN layer's")
    parser.add_argument(
        "--projection", type=int, default=2900, help="channels that x is a part of (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--constant", action="append", default=[], metavar="NAME=VALUE", help="of the kernels")
    parser.add_argument("--csv", type=Path, default=Path("short_conv.csv"))
    options = parser.parse_args()
    for name in ("batch", "steps", "channels", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected at least 1")
    if options.projection < options.channels:
        parser.error(f"--projection {options.projection}: expected at least --channels, {options.channels}")
    if not torch.cuda.is_available():
        parser.error("there is no GPU that PyTorch can use")
    from m2rnn.ops.short_conv import triton as short_conv_triton

    for constant in options.constant:
        name, _, value = constant.partition("=")
        if not hasattr(short_conv_triton, name) or not value.isdigit():
            parser.error(
                f"--constant {constant}: expected SEGMENT, ROWS, CHANNELS, WARPS, LOADS or BACKWARD_LOADS=number"
            )
        setattr(short_conv_triton, name, int(value))

    machine = hardware("cuda") | versions(("m2rnn", "torch", "triton"))
    print(" · ".join(f"{name} {value}" for name, value in machine.items()))
    print("  ".join(COLUMNS), flush=True)
    rows = []
    for layout in ("rows", "packed"):
        for row in measure(layout, options):
            shown = (f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values())
            print("  ".join(x.rjust(len(column)) for x, column in zip(shown, COLUMNS, strict=True)), flush=True)
            shape = {name: getattr(options, name) for name in ("batch", "steps", "channels", "projection")}
            rows.append({**row, **shape, "constants": " ".join(options.constant), **machine})
    write_csv(options.csv, rows)
    print(f"\nwrote {options.csv}")


def measure(layout: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row forward and a row backward."""
    torch.manual_seed(0)
    total = options.batch * options.steps
    conv = ShortConv(options.channels).cuda()
    shape, packing = (options.batch, options.steps), None
    if layout == "packed":
        inner = torch.randperm(total)[: options.batch - 1].sort().values
        bounds = torch.cat([torch.tensor([0]), inner, torch.tensor([total])]).cuda()
        shape, packing = (1, total), Packing.from_cu_seqlens(bounds, total)
    projected = torch.randn(*shape, options.projection, device="cuda", dtype=torch.bfloat16)
    x = projected[..., : options.channels].detach().requires_grad_()
    dy = torch.randn(*shape, options.channels, device="cuda", dtype=torch.bfloat16)

    def forward(fused: bool) -> torch.Tensor:
        short_conv.is_fast = FUSED if fused else lambda *_: False
        with torch.autocast("cuda", torch.bfloat16):
            y: torch.Tensor = conv(x, packing=packing, output_state=False)[0]
            return y

    def backward(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, (x, conv.weight), dy, retain_graph=True)

    ys = {fused: forward(fused) for fused in (True, False)}
    calls: dict[str, dict[bool, Callable[[], object]]] = {
        "forward": {fused: lambda fused=fused: forward(fused) for fused in ys},  # type: ignore[misc]
        "backward": {fused: lambda y=y: backward(y) for fused, y in ys.items()},  # type: ignore[misc]
    }
    double = conv.weight.detach().double()
    gpu = current_gpu()
    bandwidth = None if gpu is None else gpu.peaks.bytes
    rows = []
    for name, both in calls.items():
        timings, stopwatch = {fused: Timing(0) for fused in both}, Stopwatch("cuda")
        for call in both.values():  # compiles, and warms up
            call()
            stopwatch.once(call, Timing(0))
        for _ in range(options.repeats):
            for fused, call in both.items():
                stopwatch.once(call, timings[fused])
        del stopwatch
        results = {fused: (y.detach(),) if name == "forward" else backward(y) for fused, y in ys.items()}
        expected = exact(x, double, dy, packing, backward=name == "backward")
        moved = (2 if name == "forward" else 3) * x.numel() * x.itemsize
        rows.append(
            {
                "layout": layout,
                "pass": name,
                "fused_ms": 1e3 * timings[True].median,
                "conv1d_ms": 1e3 * timings[False].median,
                "floor_ms": None if bandwidth is None else 1e3 * moved / bandwidth,
                "fused_error": error(results[True][0], expected),
                "conv1d_error": error(results[False][0], expected),
            }
        )
    return rows


def exact(
    x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, packing: Packing | None, *, backward: bool
) -> torch.Tensor:
    """y of the first 64 channels in float64, or the gradient of x there."""
    conv = ShortConv(len(weight[:64])).double().cuda()
    with torch.no_grad():
        conv.weight.copy_(weight[:64])
    x = x.detach()[..., :64].double().requires_grad_()
    y: torch.Tensor = conv(x, packing=packing)[0]
    return torch.autograd.grad(y, x, dy[..., :64].double())[0] if backward else y.detach()


def error(x: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, of the channels that there are in ``expected``."""
    return float((x[..., : expected.shape[-1]].double() - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
