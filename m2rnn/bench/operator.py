"""``m2rnn bench op``: time and memory of the recurrence, by backend and beside attention, with floors.

What is measured is a list of groups. The contenders of a group are timed in turns; after each group the results are
written, so that an interrupted benchmark goes on where it stopped.
"""

import gc
import hashlib
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import m2rnn.ops
from m2rnn.bench.contenders import BACKENDS, CONTENDERS, PASSES, Shape, contenders_on, scan_inputs
from m2rnn.bench.floor import GPU, Peaks, cpu_peaks, current_gpu, floor, step_counts
from m2rnn.bench.measure import (
    Call,
    Effort,
    Stopwatch,
    Timing,
    in_turns,
    memory_in_child,
    warm_up,
)
from m2rnn.bench.report import COLUMNS, CSV, JSON, PLOT, STEPS, Row, Rows, empty_row, read_csv, write_plot
from m2rnn.ops import m2rnn_step
from m2rnn.runs.csv_table import write_csv
from m2rnn.runs.display import Display
from m2rnn.runs.errors import SettingsError
from m2rnn.runs.folder import run_folder, to_json, write_whole_file
from m2rnn.runs.machine import hardware, versions

GPU_SHAPES = ("B8T4096N84", "B4T4096N132", "B2T16384N84", "B1T32768N84", "B4T4096N66V32", "B4T4096N33V64")
CPU_SHAPES = ("B8T512N8K16V16", "B128T128N4K8V32")
REFERENCE_STEPS = 512  # the most that the reference loop is run for: it says so, nothing is extrapolated
DECODE_STEPS = 32  # timed together, since one is shorter than a clock can tell
STOP_SECONDS = 5.0  # a sweep goes no further after a point that took longer
# The authors' own Triton kernel, measured earlier on an H100 80GB (torch 2.11, Triton 3.6), bf16, one q and k head:
# forward ms, forward + backward ms, peak extra MiB.
PUBLISHED = {
    Shape(8, 4096, 84): (5.39, 19.66, 5.69 * 1024),
    Shape(4, 4096, 132): (3.87, 15.75, 4.52 * 1024),
    Shape(2, 16384, 84): (12.84, 57.79, 5.69 * 1024),
    Shape(1, 32768, 84): (25.82, 115.95, 5.69 * 1024),
}
DEVICE_ERROR, OUT_OF_MEMORY = "device error", "out of memory"


class BenchError(Exception):
    """The benchmark cannot go on: the message says why and what to do."""


@dataclass(frozen=True)
class Group:
    """What is timed in turns: one pass of several contenders, each at its shape."""

    section: str  # shapes, decode, length or batch
    kind: str  # a key of PASSES, or of a decode step
    entries: tuple[tuple[str, Shape], ...]


STEP, GRAPH = STEPS


def plan(shapes: Sequence[Shape], contenders: Sequence[str], device: str, quick: bool, sweep: bool) -> list[Group]:
    """All that is to be measured."""
    on_gpu = device == "cuda"
    groups = []
    for shape, kind in product(shapes, PASSES):
        short = replace(shape, steps=min(shape.steps, REFERENCE_STEPS))
        entries = ((name, short if name == "reference" else shape) for name in contenders)
        groups.append(Group("shapes", kind, tuple(entries)))
    layers = dict.fromkeys(replace(shape, batch=1, steps=1) for shape in shapes)
    backends = [name for name in contenders if name in BACKENDS]
    for layer, batch, kind in product(layers, (1, 256 if on_gpu else 16), (STEP, GRAPH) if on_gpu else (STEP,)):
        groups.append(Group("decode", kind, tuple((name, replace(layer, batch=batch)) for name in backends)))
    if sweep:
        layer = next(iter(layers))
        swept = [name for name in contenders if name != "reference"]
        lengths, batches, steps = sweep_points(on_gpu, quick)
        sweeps = {
            "length": [replace(layer, steps=steps) for steps in lengths],
            "batch": [replace(layer, steps=steps, batch=batch) for batch in batches],
        }
        for section, points in sweeps.items():
            for kind, shape in product(PASSES, points):
                groups.append(Group(section, kind, tuple((name, shape) for name in swept)))
    return [group for group in groups if group.entries]


def sweep_points(on_gpu: bool, quick: bool) -> tuple[list[int], list[int], int]:
    """Lengths at batch 1; batches, and their length."""
    lengths, batches, steps = ((10, 21), (0, 7), 1024) if on_gpu else ((6, 13), (0, 5), 128)
    stride = 3 if quick else 1
    points = [[2**n for n in range(*powers)][::stride] for powers in (lengths, batches)]
    return points[0][: 3 if quick else None], points[1], steps


class Bench:
    """One run of the benchmark: what it measures on, and what is measured so far."""

    def __init__(self, folder: Path, device: str, quick: bool, display: Display) -> None:
        self.folder, self.device, self.quick, self.display = folder, device, quick, display
        self.gpu = current_gpu() if device == "cuda" else None
        self.setup = setup(device, self.gpu, quick)
        self.all_rows = read_csv(folder / CSV)
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.stopwatch = Stopwatch(device)
        if device == "cuda":
            self.peaks = self.gpu.peaks if self.gpu else Peaks(None, None, None)
            self.effort = Effort(3, 10, 0.1) if quick else Effort(7, 50, 0.5)
        else:
            self.peaks = cpu_peaks()
            self.effort = Effort(2, 3, 0.1) if quick else Effort(3, 15, 5.0)
        self.stopped: dict[tuple[str, str, str], str] = {}

    @property
    def rows(self) -> Rows:
        """Those of this hardware and these versions."""
        return [row for row in self.all_rows if all(row[name] == value for name, value in self.setup.items())]

    def run(self, groups: Sequence[Group]) -> None:
        done = {key(row): row for row in self.rows if row["ms"] is not None or DEVICE_ERROR in row["status"]}
        for number, group in enumerate(groups, 1):
            progress = f"[{number}/{len(groups)}] {group.section}: {group.kind}"
            missing = []
            for name, shape in group.entries:
                row = done.get((group.section, group.kind, name, str(shape)))
                if row is None:
                    missing.append((name, shape))
                else:
                    self._stop_sweep_after(row)
            if missing:
                self._add(self._measure(replace(group, entries=tuple(missing)), progress))

    def _add(self, rows: Iterable[Row]) -> None:
        new = {key(row): row for row in rows}
        for row in new.values():
            self._stop_sweep_after(row)
        mine = {key(row): row for row in self.rows} | new
        others = [row for row in self.all_rows if any(row[name] != value for name, value in self.setup.items())]
        self.all_rows = [*others, *mine.values()]
        write_csv(self.folder / CSV, self.all_rows, list(COLUMNS))

    def _stop_sweep_after(self, row: Row) -> None:
        """A sweep ends for a contender where it fails or gets slow."""
        sweep = (row["section"], row["pass"], row["contender"])
        if row["section"] not in ("length", "batch") or sweep in self.stopped:
            return
        if row["status"]:
            where = f"stopped at {row['shape']}: " if row["status"].startswith(OUT_OF_MEMORY) else ""
            self.stopped[sweep] = where + row["status"]
        elif row["ms"] > 1e3 * STOP_SECONDS:
            self.stopped[sweep] = f"stopped at {row['shape']}, which took {row['ms'] / 1e3:.1f} s"

    def _measure(self, group: Group, progress: str) -> list[Row]:
        calls: dict[str, Call] = {}
        timings: dict[str, Timing] = {}
        failures: dict[str, str] = {}
        tensors: dict[Any, Any] = {}
        for name, shape in group.entries:
            if stopped := self.stopped.get((group.section, group.kind, name)):
                failures[name] = stopped
                continue
            self.display.update(f"{progress}, {shape}: {name}")
            try:
                call = self._call(group, name, shape, tensors)
                timings[name] = warm_up(call, self.stopwatch)
                calls[name] = call
            except Exception as error:  # whatever a contender raises is its result
                failures[name] = why(error)
                traceback.clear_frames(error.__traceback__)  # they hold tensors
            if name in failures:
                self._recover(group, name, shape, failures[name])
        self.display.update(f"{progress}, {', '.join(calls)}")
        try:
            for name in in_turns(calls, timings, self.effort, self.stopwatch):
                failures[name] = (
                    f"{OUT_OF_MEMORY} beside the inputs of {', '.join(other for other in calls if other != name)}"
                )
                del timings[name]
        except RuntimeError as error:  # they ran before: the GPU broke down, or another process took its memory
            raise BenchError(f"{group.kind} of {', '.join(calls)} at {shape} failed: {why(error)}") from error
        if group.kind == "forward + backward" and self.device == "cpu" and not self.quick:
            for name, shape in group.entries:
                if name in timings and group.section == "shapes":
                    self.display.update(f"{progress}, {shape}: memory of {name}")
                    try:
                        timings[name].extra_bytes = memory_in_child(name, shape)
                    except RuntimeError as error:  # what was timed stands
                        failures[name] = f"memory not measured: {why(error)}"
        return [
            self._row(group, name, shape, timings.get(name), failures.get(name, "")) for name, shape in group.entries
        ]

    def _call(self, group: Group, name: str, shape: Shape, tensors: dict[Any, Any]) -> Call:
        if group.section == "decode":
            steps = decode(shape, name, self.device, self.dtype)
            return in_graph(steps) if group.kind == GRAPH else self.stopwatch.from_idle(steps)
        contender = CONTENDERS[name]
        source = (contender.tensors, shape)
        if source not in tensors:  # backends share them: the largest leave room for one copy
            tensors[source] = contender.tensors(shape, self.device, self.dtype)
        return partial(PASSES[group.kind], contender.run, tensors[source])

    def _recover(self, group: Group, name: str, shape: Shape, failure: str) -> None:
        """Give back the memory of a contender that failed; find out whether the GPU survived."""
        gc.collect()
        if self.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            self._add([self._row(group, name, shape, None, f"{DEVICE_ERROR}: {why(error)}")])
            raise BenchError(
                f"{name} broke the GPU's context at {shape}, {group.kind} ({failure}). It is marked so in {CSV}: "
                "the same command goes on without it"
            ) from error

    def _row(self, group: Group, name: str, shape: Shape, timing: Timing | None, status: str) -> Row:
        contender, item = CONTENDERS[name], self.dtype.itemsize
        backward = "backward" in group.kind
        row: Row = empty_row() | {
            "section": group.section,
            "pass": group.kind,
            "contender": name,
            "shape": str(shape),
            "batch": shape.batch,
            "steps": shape.steps,
            "heads": shape.heads,
            "key_dim": shape.key_dim,
            "value_dim": shape.value_dim,
            "size": contender.size(shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "status": status,
        }
        bound = None
        if group.section == "decode":
            bound = floor(step_counts(shape, item), self.peaks)
        elif contender.counts is not None:
            bound = floor(contender.counts(shape, backward, item), self.peaks)
        if bound:
            row |= {"floor_ms": 1e3 * bound[0], "bound": bound[1]}
        published = self._published(group, name, shape)
        if published:
            row |= {"published_ms": published[backward], "published_MiB": published[2] if backward else None}
        if timing:
            each = 1e3 / (DECODE_STEPS if group.section == "decode" else 1)
            ms = each * timing.median
            row |= {
                "ms": ms,
                "fastest_ms": each * min(timing.seconds),
                "repeats": len(timing.seconds),
                "first_call_s": timing.first_call,
                "clock_MHz": sorted(timing.clocks)[len(timing.clocks) // 2] / 1e6 if timing.clocks else None,
                "extra_MiB": None if timing.extra_bytes is None else timing.extra_bytes / 2**20,
                "times_floor": ms / (1e3 * bound[0]) if bound else None,
                "times_published": published[backward] / ms if published else None,
            }
        digits = {name: float(f"{value:.6g}") for name, value in row.items() if isinstance(value, float)}
        return row | digits | self.setup

    def _published(self, group: Group, name: str, shape: Shape) -> tuple[float, float, float] | None:
        comparable = group.section == "shapes" and name in ("cuda", "triton") and "H100" in self.setup["device"]
        return PUBLISHED.get(shape) if comparable else None


def key(row: Row) -> tuple[str, str, str, str]:
    return row["section"], row["pass"], row["contender"], row["shape"]


def why(error: Exception) -> str:
    """One line on why a contender cannot run."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    return " ".join(str(error).split())[:300] or type(error).__name__


@torch.no_grad()
def decode(shape: Shape, backend: str, device: str, dtype: torch.dtype) -> Call:
    """Several decode steps, each from the state that the one before left."""
    q, k, v, f, weight = scan_inputs(shape, device, dtype)
    token = (q[:, 0], k[:, 0], v[:, 0], f[:, 0], weight)
    start = q.new_zeros(shape.batch, shape.heads, shape.key_dim, shape.value_dim, dtype=torch.float32)

    @torch.no_grad()
    def steps() -> Tensor:
        state = start
        for _ in range(DECODE_STEPS):
            y, state = m2rnn_step(*token, state, backend=backend)
        return y

    return steps


def in_graph(call: Call) -> Call:
    """The call, captured in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels compile and libraries start outside of the capture
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    return partial(replay, graph, kept)


def replay(graph: torch.cuda.CUDAGraph, kept: object) -> None:
    """``kept``: the graph's output, whose memory must stay."""
    graph.replay()


def setup(device: str, gpu: GPU | None, quick: bool) -> dict[str, str]:
    """What a result depends on: rows with another setup are not comparable."""
    machine = hardware(device)
    packages = versions(("m2rnn", "torch", "numba", "triton", "flash-linear-attention"))
    about = {
        "device": machine.get("gpu", machine["cpu"]),
        "multiprocessors": gpu.multiprocessors if gpu else None,
        "max_clock_MHz": round(gpu.clock / 1e6) if gpu else None,
        "peak_GB_s": round((gpu.peaks.bytes or 0) / 1e9) if gpu else None,
        "cpu": machine["cpu"],
        "cores": machine["cores"],
        "threads": machine["threads"],
        "python": packages["python"],
        **{name: packages[name] for name in ("m2rnn", "torch", "numba", "triton")},
        "fla": packages["flash-linear-attention"],
        "cuda": torch.version.cuda if device == "cuda" else None,
        "kernels": kernels(),
        "effort": "quick" if quick else "full",
    }
    return {name: "" if value is None else str(value) for name, value in about.items()}


def kernels() -> str:
    """A digest of the operator's source: other code, other times."""
    root = Path(m2rnn.ops.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".cu", ".cuh")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def choose_contenders(text: str | None, device: str) -> list[str]:
    possible = contenders_on(device)
    if text is None:
        return list(possible)
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in possible:
            raise SettingsError(f"backends {name!r}: expected, on {device}, some of {','.join(possible)}")
    return names


def choose_shapes(text: str | None, device: str) -> list[Shape]:
    default = GPU_SHAPES if device == "cuda" else CPU_SHAPES
    return list(dict.fromkeys(Shape.parse(part) for part in (text.split(",") if text is not None else default)))


def bench_op(
    folder: Path,
    *,
    device: str,
    shapes: str | None = None,
    backends: str | None = None,
    quick: bool = False,
    sweep: bool = True,
    display: Display | None = None,
) -> Rows:
    """Measure what ``folder`` does not hold yet; write op.csv, op.json and op-time.png there.

    Returns the rows of this hardware and these versions. Raises `SettingsError` for what a user can get wrong, before
    anything is measured, `RunFolderError` for the folder, and `BenchError` where the GPU breaks down.
    """
    if device not in ("cpu", "cuda"):
        raise SettingsError(f"device {device!r}: expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device 'cuda': PyTorch finds no GPU. Expected cpu")
    if sweep and find_spec("matplotlib") is None:
        raise SettingsError("the plot needs matplotlib: pip install 'm2rnn[plot]', or choose --no-sweep")
    contenders, problems = choose_contenders(backends, device), choose_shapes(shapes, device)
    if quick and shapes is None:
        problems = problems[:1]
    with run_folder(folder, {"benchmark": "op"}):
        bench = Bench(folder, device, quick, display or Display())
        bench.run(plan(problems, contenders, device, quick, sweep))
        rows = bench.rows
        write_whole_file(folder / JSON, to_json({"setup": bench.setup, "rows": list(without(bench.setup, rows))}))
        if sweep:
            write_plot(folder / PLOT, rows)
        return rows


def without(names: Iterable[str], rows: Rows) -> Iterator[Row]:
    hidden = set(names)
    for row in rows:
        yield {name: value for name, value in row.items() if name not in hidden}
