"""``m2rnn bench op``: floors against hand-computed numbers; what it writes; resuming; failures that do not end it."""

import csv
import importlib.metadata
import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner, Result

from m2rnn import cli, ops
from m2rnn.bench import operator as bench_op
from m2rnn.bench.contenders import CONTENDERS, Shape, attention_heads
from m2rnn.bench.floor import (
    GPU,
    Counts,
    Peaks,
    attention_counts,
    cpu_peaks,
    floor,
    scan_counts,
    step_counts,
)
from m2rnn.bench.measure import Effort, Stopwatch, Timing, in_turns, memory_in_child
from m2rnn.bench.report import COLUMNS, SETUP, _draw, empty_row, number, read_csv, table, write_plot
from m2rnn.ops.linear_scan import fla
from m2rnn.runs.display import Display

SHAPE = "B2T6N2K4V8"
CONTENDERS_HERE = ("cpu", "reference", "sdpa")
H100 = GPU(multiprocessors=132, clock=1.98e9, memory_clock=2.619e9, bus_bits=5120, capability=(9, 0))


def run(folder, *options: str) -> Result:
    arguments = ["bench", "op", f"--out={folder}", f"--shapes={SHAPE}", "--quick", "--device=cpu", *options]
    return CliRunner().invoke(cli.app, arguments)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few points, a processor whose speed need not be measured, and source files that stay the same."""
    monkeypatch.setattr(bench_op, "kernels", lambda: "89abcdef")
    monkeypatch.setattr(bench_op, "cpu_peaks", lambda: Peaks(special=None, multiply_adds=1e10, bytes=None))
    monkeypatch.setattr(bench_op, "sweep_points", lambda on_gpu, quick: ([4, 8, 16], [1, 2], 4))


@pytest.fixture
def groups_measured(monkeypatch):
    """The contenders timed in turns, a list for each group."""
    groups = []
    in_turns = bench_op.in_turns

    def recording(calls, *rest):
        groups.append(list(calls))
        return in_turns(calls, *rest)

    monkeypatch.setattr(bench_op, "in_turns", recording)
    return groups


# --------------------------------------------------------------------------------------------------------- floors


def test_counts_of_a_scan_are_those_counted_by_hand():
    problem = Shape(batch=2, steps=3, heads=5, key_dim=7, value_dim=4)
    elements = 2 * 3 * 5 * 7 * 4
    inputs = 6 * (7 + 7 + 5 * 4) * 2 + 6 * 5 * 4 + 5 * 4 * 4 * 4  # q, k, v in bf16; f and W in float32
    y = 6 * 5 * 4 * 2
    assert scan_counts(problem, False, 2) == Counts(elements, elements * (4 + 2), inputs + y)
    both = scan_counts(problem, True, 2)
    assert both.special == 2 * elements
    assert both.multiply_adds == elements * (4 + 1 + 1) + elements * ((4 + 1) + 4 + 4 + 4)
    assert both.bytes == (inputs + y) + (inputs + y) + inputs


def test_a_decode_step_reads_and_writes_its_state():
    problem = Shape(batch=3, steps=1, heads=5, key_dim=7, value_dim=4)
    scan = scan_counts(problem, False, 2)
    assert step_counts(problem, 2) == replace(scan, bytes=scan.bytes + 2 * 3 * 5 * 7 * 4 * 4)


def test_counts_of_attention_are_those_counted_by_hand():
    pairs = 2 * 5 * (1 + 2 + 3)  # batch, heads; a token sees itself and those before
    tensor = 2 * 3 * 5 * 8 * 2
    assert attention_counts(2, 3, 5, 8, False, 2) == Counts(pairs, 2 * pairs * 8, 4 * tensor)
    assert attention_counts(2, 3, 5, 8, True, 2) == Counts(2 * pairs, 7 * pairs * 8, 12 * tensor)


def test_the_floor_of_the_410m_shape_on_an_h100_is_its_tanh():
    assert H100.peaks.bytes == pytest.approx(3.352e12, rel=1e-3)  # 3.35 TB/s
    assert H100.peaks.multiply_adds == pytest.approx(0.5 * 1.07e15, rel=1e-2)  # at 1.98 GHz; 989 TFLOP/s at 1.83
    seconds, bound = floor(scan_counts(Shape(8, 4096, 84), False, 2), H100.peaks)
    assert bound == "special functions"
    assert seconds == pytest.approx(8 * 4096 * 84 * 64 * 16 / (16 * 132 * 1.98e9))
    assert 1e3 * seconds == pytest.approx(0.674, abs=1e-3)


def test_the_floor_is_the_slowest_of_the_rates_that_are_known():
    counts = Counts(special=10, multiply_adds=100, bytes=1000)
    assert floor(counts, Peaks(special=1, multiply_adds=1, bytes=1)) == (1000, "bytes")
    assert floor(counts, Peaks(special=1, multiply_adds=1, bytes=None)) == (100, "multiply-adds")
    assert floor(counts, Peaks(None, None, None)) is None
    assert replace(H100, capability=(7, 5)).peaks.multiply_adds is None


def test_a_processors_rate_is_that_of_a_matrix_product():
    assert 1e8 < cpu_peaks().multiply_adds < 1e14


# ----------------------------------------------------------------------------------------------------------- plan


def test_on_a_gpu_the_plan_holds_the_papers_shapes_and_sweeps_to_a_million_tokens(monkeypatch):
    monkeypatch.undo()
    shapes = bench_op.choose_shapes(None, "cuda")
    assert [str(shape) for shape in shapes[:4]] == [
        "B8 T4096 N84 K64 V16",
        "B4 T4096 N132 K64 V16",
        "B2 T16384 N84 K64 V16",
        "B1 T32768 N84 K64 V16",
    ]
    assert {shape.value_dim for shape in shapes} == {16, 32, 64}
    assert [attention_heads(shape) for shape in shapes] == [16, 24, 16, 16, 24, 24]
    plan = bench_op.plan(shapes, bench_op.choose_contenders(None, "cuda"), "cuda", quick=False, sweep=True)
    entries = {(group.section, group.kind, name, shape) for group in plan for name, shape in group.entries}
    for kind in ("forward", "forward + backward"):
        for name in ("cuda", "triton", "sdpa", "gated_deltanet"):
            assert {("shapes", kind, name, shape) for shape in shapes} <= entries
            assert {("length", kind, name, Shape(1, 2**n, 84)) for n in range(10, 21)} <= entries
            assert {("batch", kind, name, Shape(batch, 1024, 84)) for batch in (1, 2, 4, 8, 16, 32, 64)} <= entries
        assert ("shapes", kind, "reference", Shape(8, 512, 84)) in entries  # shorter, and its row says so
    for kind in ("step", "step in a CUDA graph"):
        assert {("decode", kind, "cuda", Shape(batch, 1, 84)) for batch in (1, 256)} <= entries
    assert {name for section, _, name, _ in entries if section == "decode"} == {"cuda", "triton", "reference"}


def test_gated_deltanet_is_not_timed_where_its_kernels_are_wrong(monkeypatch):
    """Asked as for training where a gradient is timed, and for the forward pass alone as without."""
    asked = []

    def why_not(*_, trained, delta):
        asked.append(trained)
        return "wrong gradients"

    monkeypatch.setattr(fla, "why_not", why_not)
    inputs = [torch.zeros(1)] * 5
    with pytest.raises(RuntimeError, match="wrong gradients"):
        CONTENDERS["gated_deltanet"].run(*inputs)
    with torch.no_grad(), pytest.raises(RuntimeError, match="wrong gradients"):
        CONTENDERS["gated_deltanet"].run(*inputs)
    assert asked == [True, False]


def test_the_published_figures_stand_beside_the_kernels_on_an_h100_alone():
    def row(device, name, kind):
        bench = object.__new__(bench_op.Bench)
        bench.dtype, bench.peaks = torch.bfloat16, H100.peaks
        bench.setup = dict.fromkeys(SETUP, "") | {"device": device}
        shape = Shape(8, 4096, 84)
        group = bench_op.Group("shapes", kind, ((name, shape),))
        timing = Timing(first_call=5.0, extra_bytes=2**27, seconds=[3e-3, 2e-3, 1e-3], clocks=[1.9e9, 1.8e9, 1.7e9])
        return bench._row(group, name, shape, timing, "")

    forward = row("NVIDIA H100 80GB HBM3", "cuda", "forward")
    assert (forward["ms"], forward["fastest_ms"], forward["published_ms"]) == (2.0, 1.0, 5.39)
    assert forward["times_published"] == pytest.approx(5.39 / 2)
    assert forward["times_floor"] == pytest.approx(2 / 0.674, rel=1e-3)
    assert (forward["clock_MHz"], forward["extra_MiB"]) == (1800, 128)
    both = row("NVIDIA H100 80GB HBM3", "triton", "forward + backward")
    assert (both["published_ms"], both["published_MiB"]) == (19.66, 5.69 * 1024)
    assert row("NVIDIA H100 80GB HBM3", "sdpa", "forward")["published_ms"] is None
    assert row("NVIDIA H200", "cuda", "forward")["published_ms"] is None
    text = table([forward, both])
    assert "5.39 (2.7×)" in text
    assert "measured earlier on an H100 80GB with torch 2.11 and Triton 3.6, not in this run" in text
    assert "measured earlier" not in table([row("NVIDIA H200", "cuda", "forward")])


def test_the_digest_of_the_kernels_follows_their_source(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(ops, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "cuda").mkdir()
    digests = set()
    for source in ("a", "b"):
        (tmp_path / "cuda" / "forward.cu").write_text(source)
        digests |= {bench_op.kernels(), bench_op.kernels()}
    assert len(digests) == 2


# -------------------------------------------------------------------------------------------------------- a run


def test_a_run_writes_table_csv_json_and_plot(tmp_path):
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    rows = read_csv(tmp_path / "op.csv")
    with (tmp_path / "op.csv").open() as file:
        assert next(csv.reader(file)) == list(COLUMNS)
    layer = "N2 K4 V8"
    expected = {
        ("shapes", kind, name, f"B2 T6 {layer}")
        for kind in ("forward", "forward + backward")
        for name in CONTENDERS_HERE
    }
    expected |= {("decode", "step", name, f"B{batch} T1 {layer}") for batch in (1, 16) for name in ("cpu", "reference")}
    for kind in ("forward", "forward + backward"):
        for name in ("cpu", "sdpa"):
            expected |= {("length", kind, name, f"B1 T{steps} {layer}") for steps in (4, 8, 16)}
            expected |= {("batch", kind, name, f"B{batch} T4 {layer}") for batch in (1, 2)}
    assert {bench_op.key(row) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert row["ms"] >= row["fastest_ms"] > 0
        assert row["repeats"] >= 2
        assert row["times_floor"] == pytest.approx(row["ms"] / row["floor_ms"], rel=1e-4)
        assert (row["bound"], row["dtype"]) == ("multiply-adds", "float32")
        assert row["torch"] == importlib.metadata.version("torch")
        assert row["status"] == ""
    content = json.loads((tmp_path / "op.json").read_text())
    assert content["setup"]["effort"] == "quick"
    assert [{name: row[name] for name in row if name not in SETUP} for row in rows] == content["rows"]
    assert (tmp_path / "op-time.png").read_bytes().startswith(b"\x89PNG")
    first = next(row for row in rows if bench_op.key(row)[:3] == ("shapes", "forward", "cpu"))
    line = next(line for line in result.stdout.splitlines() if line.startswith("| B2 T6 N2 K4 V8 | cpu |"))
    assert line.split(" | ")[2:5] == [number(first[name]) for name in ("ms", "floor_ms", "times_floor")]


def test_what_is_measured_is_not_measured_again(tmp_path, groups_measured):
    first = run(tmp_path, "--no-sweep")
    before = (tmp_path / "op.csv").read_bytes()
    assert not (tmp_path / "op-time.png").exists()
    assert groups_measured == [list(CONTENDERS_HERE)] * 2 + [["cpu", "reference"]] * 2
    groups_measured.clear()
    again = run(tmp_path, "--no-sweep")
    assert again.exit_code == 0
    assert groups_measured == []
    assert (tmp_path / "op.csv").read_bytes() == before
    assert again.stdout in first.stdout  # the same table
    run(tmp_path, "--no-sweep", "--shapes=B1T3N2K4V8", "--backends=cpu")
    assert groups_measured == [["cpu"], ["cpu"]]  # its decode steps are those of the first shape
    assert (tmp_path / "op.csv").read_bytes().startswith(before)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, groups_measured):
    recording = bench_op.in_turns

    def interrupted(*arguments):
        if len(groups_measured) == 2:
            raise KeyboardInterrupt
        return recording(*arguments)

    monkeypatch.setattr(bench_op, "in_turns", interrupted)
    stopped = run(tmp_path, "--no-sweep")
    assert stopped.exit_code == 130
    assert "the same command goes on" in stopped.stderr
    assert len(read_csv(tmp_path / "op.csv")) == 6
    (tmp_path / "op.csv.partial").write_text("section,pa")  # a kill in the middle of writing
    monkeypatch.setattr(bench_op, "in_turns", recording)
    groups_measured.clear()
    assert run(tmp_path, "--no-sweep").exit_code == 0
    assert groups_measured == [["cpu", "reference"]] * 2
    assert len(read_csv(tmp_path / "op.csv")) == 10
    assert not (tmp_path / "op.csv.partial").exists()


def test_results_of_other_versions_are_measured_anew_and_kept(tmp_path, monkeypatch, groups_measured):
    options = ("--no-sweep", "--backends=sdpa")
    run(tmp_path, *options)
    monkeypatch.setattr(bench_op, "kernels", lambda: "0123abcd")
    groups_measured.clear()
    assert run(tmp_path, *options).exit_code == 0
    assert groups_measured == [["sdpa"]] * 2
    rows = read_csv(tmp_path / "op.csv")
    assert len(rows) == 4
    assert [row["kernels"] == "0123abcd" for row in rows] == [False, False, True, True]
    assert json.loads((tmp_path / "op.json").read_text())["setup"]["kernels"] == "0123abcd"
    assert len(json.loads((tmp_path / "op.json").read_text())["rows"]) == 2


def test_a_contender_that_fails_is_a_row_with_its_reason_and_tried_again(tmp_path, monkeypatch, groups_measured):
    def broken(*inputs):
        raise RuntimeError("needs Triton ≥ 3.7.1\nor tilelang")

    working = CONTENDERS["sdpa"]
    monkeypatch.setitem(CONTENDERS, "sdpa", replace(working, run=broken))
    options = ("--no-sweep", "--backends=reference,sdpa")
    result = run(tmp_path, *options)
    assert result.exit_code == 0
    assert "sdpa: needs Triton ≥ 3.7.1 or tilelang" in result.stdout.splitlines()
    rows = [row for row in read_csv(tmp_path / "op.csv") if row["contender"] == "sdpa"]
    assert [(row["status"], row["ms"]) for row in rows] == [("needs Triton ≥ 3.7.1 or tilelang", None)] * 2
    monkeypatch.setitem(CONTENDERS, "sdpa", working)
    groups_measured.clear()
    assert run(tmp_path, *options).exit_code == 0
    assert groups_measured == [["sdpa"]] * 2
    assert all(row["ms"] for row in read_csv(tmp_path / "op.csv"))


def test_a_sweep_ends_where_memory_does_and_says_so(tmp_path, monkeypatch):
    working = CONTENDERS["sdpa"]

    def hungry(shape, *rest):
        if shape.steps >= 8:
            raise torch.OutOfMemoryError
        return working.tensors(shape, *rest)

    monkeypatch.setitem(CONTENDERS, "sdpa", replace(working, tensors=hungry))
    result = run(tmp_path, "--backends=sdpa", "--shapes=B1T4N2K4V8")
    assert result.exit_code == 0
    status = {
        row["steps"]: row["status"]
        for row in read_csv(tmp_path / "op.csv")
        if (row["section"], row["pass"]) == ("length", "forward")
    }
    assert status == {4: "", 8: "out of memory", 16: "stopped at B1 T8 N2 K4 V8: out of memory"}


def test_a_sweep_ends_after_a_slow_point_also_when_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_op, "STOP_SECONDS", 0.0)
    for _ in range(2):
        assert run(tmp_path, "--backends=sdpa").exit_code == 0
        rows = [row for row in read_csv(tmp_path / "op.csv") if row["section"] == "batch"]
        assert [row["status"].split(",")[0] for row in rows] == ["", "stopped at B1 T4 N2 K4 V8"] * 2


def test_a_contender_that_breaks_the_gpu_is_marked_so_and_left_out_from_then_on(tmp_path, monkeypatch):
    def dead():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    bench = bench_op.Bench(tmp_path, "cpu", True, Display())
    bench.device = "cuda"
    group = bench_op.Group("length", "forward", (("sdpa", Shape(1, 4, 2, 4, 8)),))
    with pytest.raises(bench_op.BenchError, match=r"broke the GPU's context.*the same command goes on without it"):
        bench._recover(group, *group.entries[0], "illegal memory access")
    again = bench_op.Bench(tmp_path, "cpu", True, Display())
    again.run([group, replace(group, entries=(("sdpa", Shape(1, 8, 2, 4, 8)),))])
    status = [row["status"] for row in read_csv(tmp_path / "op.csv")]
    assert status == ["device error: an illegal memory access was encountered"] * 2


def test_a_plot_is_drawn_from_what_there_is(tmp_path):
    write_plot(tmp_path / "plot.png", [])
    assert (tmp_path / "plot.png").exists()
    row = empty_row() | {"section": "length", "pass": "forward", "contender": "cuda", "size": "2 heads"}
    write_plot(tmp_path / "plot.png", [row | {"steps": 1024, "ms": 1.0}, row | {"steps": 2048, "status": "out"}])


def test_an_axis_of_less_than_a_decade_has_several_ticks():
    from matplotlib.figure import Figure

    panel = Figure().add_subplot()
    row = {"steps": 128, "size": "2 heads", "floor_ms": 0.3}
    points = [row | {"batch": 1, "ms": 0.5}, row | {"batch": 8, "ms": 2.5}]
    _draw(panel, "batch", "forward", {"cpu": points}, {"cpu": ("k", "o")})
    assert len([tick for tick in panel.get_yticks() if 0.3 <= tick <= 2.5]) >= 3


def test_timing_ends_after_enough_repeats_or_one_slow_call():
    effort = Effort(least=3, most=5, seconds=0.25)
    assert not Timing(0, seconds=[0.2, 0.2]).enough(effort)
    assert Timing(0, seconds=[0.1, 0.1, 0.1]).enough(effort)
    assert not Timing(0, seconds=[0.01] * 4).enough(effort)
    assert Timing(0, seconds=[0.01] * 5).enough(effort)
    assert Timing(0, seconds=[1.5]).enough(effort)


def test_one_that_does_not_fit_beside_the_others_is_left_out():
    def hungry():
        raise torch.OutOfMemoryError

    timings = {"small": Timing(0), "large": Timing(0)}
    failed = in_turns({"small": int, "large": hungry}, timings, Effort(2, 2, 1.0), Stopwatch("cpu"))
    assert failed == {"large"}
    assert len(timings["small"].seconds) == 2


def test_memory_of_the_reference_loop_is_that_of_its_states():
    shape = Shape(4, 200, 8, 16, 16)
    state = shape.batch * shape.state * 4
    assert 3 * shape.steps * state < memory_in_child("reference", shape) < 15 * shape.steps * state


def test_what_was_timed_stands_where_its_memory_cannot_be_measured(tmp_path, monkeypatch):
    """The process that measures it is killed for want of memory, or finds no /proc."""
    bench = bench_op.Bench(tmp_path, "cpu", False, Display())
    bench.effort = Effort(1, 1, 0.0)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    entries = (("cpu", Shape(1, 4, 1, 4, 4)),)
    (row,) = bench._measure(bench_op.Group("shapes", "forward + backward", entries), "")
    assert row["ms"] > 0
    assert row["extra_MiB"] is None
    assert row["status"] == "memory not measured: its process ended with status 1"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_measured_with_its_clock_and_memory(tmp_path):
    result = run(tmp_path, "--device=cuda", "--shapes=B2T64N4K16V16")
    assert result.exit_code == 0, result.output
    rows = {bench_op.key(row): row for row in read_csv(tmp_path / "op.csv")}
    for contender in ("cuda", "triton", "sdpa"):
        for kind in ("forward", "forward + backward"):
            row = rows["shapes", kind, contender, "B2 T64 N4 K16 V16"]
            assert row["ms"] > row["floor_ms"] > 0, row["status"]
            assert 100 < row["clock_MHz"] < 1.05 * float(row["max_clock_MHz"])
            assert row["extra_MiB"] < 256
    for contender in ("cuda", "triton"):
        for kind in ("step", "step in a CUDA graph"):
            assert rows["decode", kind, contender, "B256 T1 N4 K16 V16"]["ms"] > 0


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--shapes=8x4096", "shapes '8x4096': expected such as B8T4096N84"),
        ("--shapes=B8T0N84", "shapes 'B8T0N84'"),
        ("--shapes=", "shapes ''"),
        ("--backends=cudnn", "backends 'cudnn': expected, on cpu, some of cpu,reference,sdpa"),
        ("--backends=cuda", "backends 'cuda': expected, on cpu"),
        ("--device=abacus", "device 'abacus': expected cpu or cuda"),
        ("--out=/dev/null", "cannot write to /dev/null"),
    ],
)
def test_a_mistake_is_named_without_a_traceback(tmp_path, option, message):
    result = run(tmp_path, option)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"m2rnn: {message}")
    assert len(result.stderr.splitlines()) == 1


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    assert "holds files, but no run" in run(tmp_path).stderr


@pytest.mark.parametrize("damage", [lambda text: "a,b\n1,2\n", lambda text: text[: len(text) - 60]])
def test_a_table_that_is_not_ours_is_refused(tmp_path, damage):
    options = ("--no-sweep", "--backends=sdpa")
    run(tmp_path, *options)
    (tmp_path / "op.csv").write_text(damage((tmp_path / "op.csv").read_text()))
    result = run(tmp_path, *options)
    assert result.exit_code == 2
    assert "is not a table of this version of m2rnn" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(tmp_path):
    assert "PyTorch finds no GPU" in run(tmp_path, "--device=cuda").stderr


def test_shapes_are_read_as_they_are_written():
    shape = Shape.parse("b4 t4096 n66 v32")
    assert shape == Shape(4, 4096, 66, 64, 32)
    assert Shape.parse(str(shape)) == shape
