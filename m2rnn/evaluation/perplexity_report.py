"""The results of ``m2rnn eval text`` as tables and plots."""

from itertools import cycle
from pathlib import Path
from typing import Any

from m2rnn.runs.plot import STYLES, save_figure

BY_CONTEXT, BY_POSITION = "perplexity-by-context.png", "loss-by-position.png"
STATES_BY_POSITION = "states-by-position.png"
PLOTS = (BY_CONTEXT, BY_POSITION, STATES_BY_POSITION)
MOST_COLUMNS = 8  # of the size of the state in the table

Results = dict[str, Any]


def table(results: Results) -> str:
    """One row a model and context; then what was measured besides.

    These are one row a multiple of the training length, one a recurrent layer, and what ``--recall`` adds.
    """
    models = results["models"]
    width = max(len("model"), *map(len, models)) + 2
    lines = [
        f"{'model':<{width}}{'windows':>8}{'context':>9}{'stride':>8}{'tokens':>12}{'loss':>9}{'perplexity':>12}"
        f"{'bits/byte':>11}"
    ]
    for name, model in models.items():
        for row in model["contexts"]:
            bits = "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
            lines.append(
                f"{name:<{width}}{row['windows']:>8}{row['context'] or 'full':>9}{row['stride'] or '-':>8}"
                f"{row['tokens_scored']:>12,}{row['loss']:>9.4f}{row['perplexity']:>12.4g}{bits:>11}"
            )
    positions = {name: model["positions"] for name, model in models.items() if model["positions"]}
    if positions:
        lines += ["", "loss by position, ± standard error over windows"]
        columns = [max(len(name), 18) + 2 for name in positions]
        titles = (f"{name:>{column}}" for name, column in zip(positions, columns, strict=True))
        lines.append(f"{'tokens seen':<18}" + "".join(titles))
        for number, first in enumerate(next(iter(positions.values()))["multiples"]):
            span = f"{first['start'] + 1:,}-{first['stop']:,}"
            cells = []
            for found, column in zip(positions.values(), columns, strict=True):
                row = found["multiples"][number]
                error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
                cells.append(f"{row['loss']:.4f}{error}".rjust(column))
            lines.append(f"{span:<18}" + "".join(cells))
    return "\n".join([*lines, *_layers(models, width), *_recall(models, width)])


def _layers(models: Results, width: int) -> list[str]:
    """The spectrum of W and the size of the state, a row a layer."""
    measured = {name: model for name, model in models.items() if model["state_rms"]}
    if not measured:
        return []
    positions = next(iter(measured.values()))["state_rms"][0]["positions"]
    shown = _some(len(positions))
    titles = "".join(f"{f'{positions[n]:,}':>9}" for n in shown)
    lines = [
        "",
        "W: largest |eigenvalue| and singular value, (median) over heads; state: RMS by tokens seen",
        f"{'model':<{width}}{'layer':>5}  {'mixer':<15}{'|eigenvalue|':>15}{'singular value':>17}{titles}",
    ]
    for name, model in measured.items():
        spectra = {row["layer"]: row for row in model["spectra"]}
        for row in model["state_rms"]:
            found = spectra.get(row["layer"])
            of_weight = ["-" if found is None else _largest(found, kind) for kind in ("eigenvalue", "singular_value")]
            sizes = "".join(f"{row['rms'][n]:>9.3g}" for n in shown)
            lines.append(
                f"{name:<{width}}{row['layer']:>5}  {row['mixer']:<15}{of_weight[0]:>15}{of_weight[1]:>17}{sizes}"
            )
    return lines


def _largest(row: Results, kind: str) -> str:
    return f"{row[f'largest_{kind}']:.3f} ({row[f'median_{kind}']:.3f})"


def _some(count: int) -> list[int]:
    """Indices of the multiples 1 to ``count`` to show: all if they fit, else the first, the last and powers of two."""
    if count <= MOST_COLUMNS:
        return list(range(count))
    powers = [2**n - 1 for n in range(count.bit_length()) if 2**n <= count]
    return sorted({0, *powers[2 - MOST_COLUMNS :], count - 1})


def _recall(models: Results, width: int) -> list[str]:
    """Repeated tokens and others, a row a context; copying and attention off, a row a model."""
    measured = {name: model for name, model in models.items() if model["recall"]}
    if not measured:
        return []
    ngram = next(iter(measured.values()))["recall"]["ngram"]
    lines = [
        "",
        f"tokens that repeat an earlier {ngram}-gram of their document, and others",
        f"{'model':<{width}}{'context':>15}{'repeated':>12}{'loss':>9}{'perplexity':>12}{'others':>12}{'loss':>9}"
        f"{'perplexity':>12}",
    ]
    for name, model in measured.items():
        rows = [(f"{row['context'] or 'full'}", row["recall"]) for row in model["contexts"]]
        if model["recall"]["attention_off"]:
            rows.append(("attention off", model["recall"]["attention_off"]))
        lines += [
            f"{name:<{width}}{title:>15}" + "".join(_class(row[kind]) for kind in ("repeated", "others"))
            for title, row in rows
        ]
    lines += [
        "",
        "copying random tokens, and the loss of the first context with attention and without",
        f"{'model':<{width}}{'length':>9}{'loss':>9}{'accuracy':>11}{'loss with':>12}{'without':>10}",
    ]
    for name, model in measured.items():
        copying, off = model["recall"]["copying"], model["recall"]["attention_off"]
        with_and_without = (
            f"{model['contexts'][0]['loss']:>12.4f}{off['loss']:>10.4f}" if off else f"{'-':>12}{'-':>10}"
        )
        lines.append(
            f"{name:<{width}}{copying['length']:>9,}{copying['loss']:>9.4f}{copying['accuracy']:>11.2%}"
            + with_and_without
        )
    return lines


def _class(row: Results) -> str:
    if row["loss"] is None:
        return f"{0:>12}{'-':>9}{'-':>12}"
    return f"{row['tokens']:>12,}{row['loss']:>9.4f}{row['perplexity']:>12.4g}"


def write_plots(folder: Path, results: Results) -> None:
    """Perplexity against context, if there are several contexts; loss and states by position, if measured."""
    longest = {name: model["text"]["longest_document"] for name, model in results["models"].items()}
    curves = {
        name: sorted((row["context"] or longest[name], row["perplexity"]) for row in model["contexts"])
        for name, model in results["models"].items()
    }
    if any(len(points) > 1 for points in curves.values()):
        _plot(folder / BY_CONTEXT, curves, "context (tokens)", "perplexity")
    positions = {name: model["positions"] for name, model in results["models"].items() if model["positions"]}
    if positions:
        curves = {
            name: [((row["start"] + 1 + row["stop"]) / 2, row["loss"]) for row in found["buckets"]]
            for name, found in positions.items()
        }
        train_length = next(iter(positions.values()))["train_length"]
        _plot(folder / BY_POSITION, curves, "tokens seen", "loss (nats a token)", train_length)
        states = {name: model["state_rms"] for name, model in results["models"].items() if model["state_rms"]}
        if states:
            _plot_states(folder / STATES_BY_POSITION, states, train_length)


def _plot(
    path: Path,
    curves: dict[str, list[tuple[float, float]]],
    x_title: str,
    y_title: str,
    train_length: int | None = None,
) -> None:
    from matplotlib.figure import Figure  # without pyplot: no window system, no global figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for (name, points), (colour, marker) in zip(curves.items(), cycle(STYLES), strict=False):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=colour, marker=marker if train_length is None else None, label=name)
    if train_length is not None:
        axes.axvline(train_length, color="0.5", linestyle="--", label="longest in training")
    else:
        ticks = sorted({x for points in curves.values() for x, _ in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel(x_title)
    axes.set_ylabel(y_title)
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path)


def _plot_states(path: Path, states: dict[str, list[Results]], train_length: int) -> None:
    """A panel a model and a line a layer, coloured by depth and named at its end."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    columns = min(len(states), 3)
    lines = -(-len(states) // columns)
    figure = Figure(figsize=(0.8 + 6.2 * columns, 4.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten().tolist()
    for unused in panels[len(states) :]:
        unused.set_axis_off()
    sizes = [size for rows in states.values() for row in rows for size in row["rms"]]
    if 0 < 10 * min(sizes) < max(sizes):
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[0].yaxis.set_major_formatter("{x:g}")
        panels[0].yaxis.set_minor_locator(NullLocator())
    else:
        panels[0].set_ylim(0, 1.05 * max(sizes) or 1)
    for axes, (name, rows) in zip(panels, states.items(), strict=False):
        colours = colormaps["viridis"]([0.9 * n / max(1, len(rows) - 1) for n in range(len(rows))])
        for row, colour in zip(rows, colours, strict=True):
            axes.plot(row["positions"], row["rms"], "o-", color=colour, markersize=2.5, linewidth=1.2)
        axes.axvline(train_length, color="0.5", linestyle="--", linewidth=1)
        axes.annotate("longest in training", (train_length, 1.01), xycoords=("data", "axes fraction"), fontsize=8)
        axes.set_title(name, fontsize=10, pad=16)
        axes.set_xlabel("tokens seen")
        axes.set_xlim(0, 1.03 * rows[0]["positions"][-1])
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    for axes in panels[::columns]:
        axes.set_ylabel("RMS of the recurrent state")
    leader = {"arrowstyle": "-", "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 3}
    for axes, rows in zip(panels, states.values(), strict=False):  # once all panels have set the scale that they share
        names = [f"{row['layer']} {row['mixer']}" for row in rows]
        ends = [(row["positions"][-1], row["rms"][-1]) for row in rows]
        heights = [float(axes.transAxes.inverted().transform(axes.transData.transform(end))[1]) for end in ends]
        for title, end, height, line in zip(names, ends, _apart(heights, 0.042), axes.get_lines(), strict=False):
            axes.annotate(
                title,
                end,
                (1.05, height),
                textcoords="axes fraction",
                fontsize=8,
                color=line.get_color(),
                verticalalignment="center",
                arrowprops=leader | {"color": line.get_color()},
            )
    save_figure(figure, path)


def _apart(heights: list[float], gap: float) -> list[float]:
    """``heights`` moved until they are ``gap`` apart, or less if they do not fit between 0 and 1, in the same order."""
    gap = min(gap, 1 / max(1, len(heights) - 1))
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved = list(heights)
    lowest = 0.0
    for n in order:
        moved[n] = max(moved[n], lowest)
        lowest = moved[n] + gap
    highest = 1.0
    for n in reversed(order):
        moved[n] = min(moved[n], highest)
        highest = moved[n] - gap
    return moved
