"""The results of ``m2rnn bench op``: CSV, table and plot."""

import csv
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2rnn.bench.contenders import BACKENDS, PASSES
from m2rnn.runs.errors import SettingsError
from m2rnn.runs.plot import STYLES, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CSV, JSON, PLOT = "op.csv", "op.json", "op-time.png"

STEPS = ("step", "step in a CUDA graph")
PANELS = tuple((section, kind) for kind in PASSES for section in ("length", "batch"))
NAMES = {"sdpa": "attention (SDPA)", "gated_deltanet": "Gated DeltaNet"}

Row = dict[str, Any]
Rows = list[Row]

MEASURED = {
    "section": str,
    "pass": str,
    "contender": str,
    "shape": str,
    "batch": int,
    "steps": int,
    "heads": int,
    "key_dim": int,
    "value_dim": int,
    "size": str,
    "dtype": str,
    "status": str,
    "ms": float,
    "fastest_ms": float,
    "repeats": int,
    "first_call_s": float,
    "clock_MHz": float,
    "extra_MiB": float,
    "floor_ms": float,
    "bound": str,
    "times_floor": float,
    "published_ms": float,
    "times_published": float,
    "published_MiB": float,
}
SETUP = (
    *("device", "multiprocessors", "max_clock_MHz", "peak_GB_s", "cpu", "cores", "threads"),
    *("python", "m2rnn", "torch", "numba", "triton", "fla", "cuda", "kernels", "effort"),
)
COLUMNS: Mapping[str, type] = MEASURED | dict.fromkeys(SETUP, str)


def read_csv(path: Path) -> Rows:
    """The rows of an earlier run; none if there is no file."""
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != tuple(COLUMNS):
                raise ValueError
            return [_parse(row) for row in reader]
    except ValueError:
        raise SettingsError(
            f"{path} is not a table of this version of m2rnn: move it away, or choose another folder"
        ) from None


def empty_row() -> Row:
    return {name: "" if kind is str else None for name, kind in COLUMNS.items()}


def _parse(row: Mapping[str, str]) -> Row:
    if None in row.values():  # too few fields
        raise ValueError
    return {name: kind(row[name]) if row[name] or kind is str else None for name, kind in COLUMNS.items()}


def table(rows: Sequence[Row]) -> str:
    """Shapes, decode steps and the ends of the sweeps, in Markdown, and why what is missing is."""
    if not rows:
        return "nothing was measured"
    parts = [_machine(rows), _shapes(rows), _decode(rows), *_sweeps(rows)]
    if any(row["published_ms"] for row in rows):
        parts.append(
            "published: the authors' own Triton kernel, measured earlier on an H100 80GB with torch 2.11 and "
            "Triton 3.6, not in this run"
        )
    reasons = dict.fromkeys(f"{row['contender']}: {row['status']}" for row in rows if row["status"])
    return "\n".join(part for part in (*parts, *reasons) if part).replace("\n\n\n", "\n\n").rstrip()


def _machine(rows: Sequence[Row]) -> str:
    first = rows[0]
    words = [first["device"], first["dtype"], f"torch {first['torch']}"]
    words += [f"{name} {first[name]}" for name in ("triton", "cuda", "fla") if first[name] and first["max_clock_MHz"]]
    if clocks := [row["clock_MHz"] for row in rows if row["clock_MHz"]]:
        words.append(f"clock {min(clocks):.0f} to {max(clocks):.0f} of {first['max_clock_MHz']} MHz")
    else:
        words.append(f"{first['threads']} threads")
    return ", ".join(words) + "\n"


def _shapes(rows: Sequence[Row]) -> str:
    """One line a shape and contender."""
    names = ["shape", "contender"]
    for kind in PASSES:
        names += [f"{kind} ms", "floor", "× floor"]
    names.append("extra MiB")
    comparable = any(row["published_ms"] for row in rows)
    if comparable:
        names += [*(f"{kind}: published" for kind in PASSES), "extra MiB: published"]
    lines = []
    passes = _by(rows, "shapes", "shape", "contender")
    for (shape, contender), found in passes.items():
        size = next(iter(found.values()))["size"]
        line = [shape, contender if size.endswith("heads") else f"{contender}, {size}"]
        both = [found.get(kind, empty_row()) for kind in PASSES]
        for row in both:
            line += [number(row["ms"]), number(row["floor_ms"]), number(row["times_floor"])]
        line.append(number(both[-1]["extra_MiB"]))
        if comparable:
            line += [_published(row["published_ms"], row["times_published"]) for row in both]
            line.append(_published(both[-1]["published_MiB"], None))
        lines.append(line)
    return _markdown(names, lines, left=2)


def _published(figure: float | None, times: float | None) -> str:
    return number(figure) if times is None else f"{number(figure)} ({times:.1f}×)"


def _decode(rows: Sequence[Row]) -> str:
    """One line a layer, batch and backend."""
    lines = []
    steps = _by(rows, "decode", "shape", "contender")
    kinds = [kind for kind in STEPS if any(kind in found for found in steps.values())]
    for (shape, contender), found in steps.items():
        line = [shape, contender, number(next(iter(found.values()))["floor_ms"], 1e3)]
        for kind in kinds:
            row = found.get(kind, empty_row())
            line += [number(row["ms"], 1e3), number(row["times_floor"])]
        lines.append(line)
    names = ["one decode step", "contender", "floor µs"]
    for kind in kinds:
        names += [f"{kind} µs", "× floor"]
    return _markdown(names, lines, left=2)


def _by(rows: Sequence[Row], section: str, *names: str) -> dict[tuple[str, ...], dict[str, Row]]:
    """The rows of a section with something to show, by these columns and then by pass."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["section"] == section:
            found.setdefault(tuple(row[name] for name in names), {})[row["pass"]] = row
    return {name: passes for name, passes in found.items() if any(row["ms"] for row in passes.values())}


def _markdown(names: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    if not lines:
        return ""
    rule = ["---"] * left + ["---:"] * (len(names) - left)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (names, rule, *lines))


def number(value: float | None, scale: float = 1.0) -> str:
    """Three significant digits, and no fewer than the integer has."""
    if value is None:
        return "–"
    value *= scale
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def _sweeps(rows: Sequence[Row]) -> list[str]:
    """The ends of every curve of the plot."""
    lines = []
    for section, kind in PANELS:
        for contender, points in _curves(rows, section, kind).items():
            first, last = points[0], points[-1]
            axis, column = ("T", "steps") if section == "length" else ("B", "batch")
            milliseconds, tokens = (
                " → ".join(number(row["ms"] * scale(row)) for row in (first, last))
                for scale in (lambda row: 1, lambda row: 1e6 / row["batch"] / row["steps"])
            )
            reach = f"{axis} {first[column]:,} → {last[column]:,}"
            lines.append(f"{kind}, {contender}, {reach}: {milliseconds} ms, {tokens} ns a token")
    return [*lines, ""] if lines else []


def _curves(rows: Sequence[Row], section: str, kind: str) -> dict[str, Rows]:
    """The measured points of one panel by contender, in order."""
    curves: dict[str, Rows] = {}
    for row in rows:
        if (row["section"], row["pass"]) == (section, kind) and row["ms"] is not None:
            curves.setdefault(row["contender"], []).append(row)
    return {name: sorted(points, key=lambda row: (row["batch"], row["steps"])) for name, points in curves.items()}


def write_plot(path: Path, rows: Sequence[Row]) -> None:
    """Time against length and against batch, one panel a sweep and pass, all logarithmic."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global figure

    swept = [row for row in rows if row["section"] in ("length", "batch")]
    styles = dict(zip(dict.fromkeys(row["contender"] for row in swept), cycle(STYLES), strict=False))
    figure = Figure(figsize=(10, 7.4), layout="constrained")
    handles: dict[str, Any] = {}
    for panel, (section, kind) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _draw(panel, section, kind, _curves(swept, section, kind), styles)
        handles |= {label: line for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(", ".join(dict.fromkeys((*_layer(swept[0]), swept[0]["dtype"], swept[0]["device"]))))
    save_figure(figure, path)


def _layer(row: Row) -> tuple[str]:
    return (f"M2RNN with {row['heads']} heads, K {row['key_dim']}, V {row['value_dim']}",)


def _draw(panel: "Axes", section: str, kind: str, curves: Mapping[str, Rows], styles: Mapping[str, Any]) -> None:
    from matplotlib.ticker import LogLocator

    column = "steps" if section == "length" else "batch"
    for name, points in curves.items():
        colour, marker = styles[name]
        places = [row[column] for row in points]
        label = NAMES.get(name, f"M2RNN, {name}")
        label += "" if points[0]["size"].endswith("heads") else f", {points[0]['size']}"
        panel.plot(places, [row["ms"] for row in points], color=colour, marker=marker, label=label, zorder=3)
    floors = {row[column]: row["floor_ms"] for name in BACKENDS for row in curves.get(name, ()) if row["floor_ms"]}
    if floors:
        places = sorted(floors)
        panel.plot(places, [floors[place] for place in places], color="0.4", linestyle=":", label="M2RNN, floor")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ticks = sorted({row[column] for points in curves.values() for row in points})
    panel.set_xticks(ticks, [_short(tick) for tick in ticks])
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    panel.minorticks_off()
    panel.set_xlabel("tokens T, batch 1" if section == "length" else f"batch, {_steps(curves)}")
    panel.set_ylabel("time (ms)")
    panel.set_title(kind)
    panel.grid(color="0.9")
    panel.spines[["top", "right"]].set_visible(False)


def _steps(curves: Mapping[str, Rows]) -> str:
    return ", ".join({f"T {row['steps']:,}" for points in curves.values() for row in points})


def _short(count: int) -> str:
    """65536 as 64k."""
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if count >= size and count % size == 0:
            return f"{count // size}{letter}"
    return str(count)
