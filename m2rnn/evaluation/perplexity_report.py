"""The results of ``m2rnn eval --data`` as tables and plots."""

from itertools import cycle
from pathlib import Path
from typing import Any

from m2rnn.evaluation.plot import STYLES, save_figure

BY_CONTEXT, BY_POSITION = "perplexity-by-context.png", "loss-by-position.png"
PLOTS = (BY_CONTEXT, BY_POSITION)

Results = dict[str, Any]


def table(results: Results) -> str:
    """One row a model and context; then, if it was measured, one row a multiple of the training length."""
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
    return "\n".join(lines)


def write_plots(folder: Path, results: Results) -> None:
    """Perplexity against context, if there are several contexts; loss by position, if it was measured."""
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
