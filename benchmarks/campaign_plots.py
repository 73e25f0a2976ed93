"""The plots of campaign_report.py: one file a question, in one style."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from campaign import Result
from campaign_measure import unpack
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from m2rnn.runs.plot import STYLES, save_figure

if TYPE_CHECKING:
    from campaign_report import Comparison

MODELS_A_PLOT = len(STYLES)
SETTLED = 0.15  # of the training: what is above the loss there is cut off, since every model starts alike
POINTS_AN_OCTAVE = 8  # of the loss by position: what one document says at one place is noise
DOT = 5  # pixels that a label keeps from the middle of a dot
FARTHEST = 16  # training lengths


def draw(comparison: "Comparison", folder: Path) -> None:
    """Write the plots of a comparison: of a sweep, loss by rate; of other stages, all that seeds and lengths show."""
    models = [model for model in comparison.models if comparison.healthy(model)]
    if not models:
        return
    if comparison.sweep:
        drawn: list[tuple[str, Callable[[Axes, Comparison, Sequence[str]], None]]] = [("rates", rates)]
    else:
        drawn = [("positions", positions), ("training", training)]
        perplexity(comparison, models, folder / f"perplexity-{comparison.slug}.png")
        if len(models) > 1:
            trade_off(comparison, models, folder / f"trade-off-{comparison.slug}.png")
    parts = [models[start : start + MODELS_A_PLOT] for start in range(0, len(models), MODELS_A_PLOT)]
    for kind, panel in drawn:
        for index, part in enumerate(parts):
            figure = Figure(figsize=(8, 4.2), layout="constrained")
            axes = figure.subplots()
            panel(axes, comparison, part)
            axes.grid(alpha=0.3)
            axes.set_title(comparison.name, fontsize=10)
            figure.legend(loc="outside right center", frameon=False, fontsize=8)
            end = "" if len(parts) == 1 else f"-{index + 1}"
            save_figure(figure, folder / f"{kind}-{comparison.slug}{end}.png")


def rates(axes: Axes, comparison: "Comparison", models: Sequence[str]) -> None:
    """Validation loss by learning rate, a line a model, its best rate in a ring."""
    from campaign_report import by_rate

    for model, (colour, marker) in zip(models, STYLES, strict=False):
        losses = by_rate(comparison, model)
        xs = sorted(losses)
        axes.plot(xs, [losses[x] for x in xs], color=colour, marker=marker, markersize=5, label=model)
        best = min(losses, key=lambda rate: losses[rate])
        axes.plot([best], [losses[best]], "o", markersize=12, markerfacecolor="none", color=colour)
    axes.set_xscale("log")
    every = sorted({run.learning_rate or 0.0 for runs in comparison.runs.values() for run in runs})
    axes.set_xticks(every, [f"{rate:g}" for rate in every])
    axes.minorticks_off()
    axes.set_xlabel("learning rate (ring: the best)")
    axes.set_ylabel("validation loss (nats per token)")


def positions(axes: Axes, comparison: "Comparison", models: Sequence[str]) -> None:
    """Loss by position in long documents: the median of the seeds, and their range as a band."""
    for model, (colour, _) in zip(models, STYLES, strict=False):
        runs = comparison.healthy(model)
        buckets = np.array([unpack(run["positions"]["buckets"]) for run in runs])
        width = runs[0]["settings"]["context"] * len(runs[0]["positions"]["multiples"]) / buckets.shape[1]
        starts = octaves(buckets.shape[1])
        counts = np.diff([*starts, buckets.shape[1]])
        xs = (starts + counts / 2) * width
        buckets = np.add.reduceat(buckets, starts, axis=1) / counts
        axes.plot(xs, np.median(buckets, axis=0), color=colour, label=model, linewidth=1.4)
        if len(buckets) > 1:
            axes.fill_between(
                xs, np.min(buckets, axis=0), np.max(buckets, axis=0), color=colour, alpha=0.2, linewidth=0
            )
    context = comparison.healthy(models[0])[0]["settings"]["context"]
    axes.axvline(context, color="black", linestyle="--", linewidth=0.8, label="training length")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda place, _: f"{place:,.0f}")
    axes.set_xlabel("position in the document (tokens)")
    axes.set_ylabel("loss (nats per token)")


def octaves(count: int) -> np.ndarray:
    """Where to begin each mean of buckets, so that a doubling of the position has at most POINTS_AN_OCTAVE of them."""
    starts = [0]
    while (following := starts[-1] + max(1, starts[-1] // POINTS_AN_OCTAVE)) < count:
        starts.append(following)
    return np.array(starts)


def training(axes: Axes, comparison: "Comparison", models: Sequence[str]) -> None:
    """Training loss, a line a run, from where it is below the loss of the first steps."""
    highest, lowest = [], []
    for model, (colour, _) in zip(models, STYLES, strict=False):
        for index, run in enumerate(comparison.results[model]):
            curve = run["training"]["curve"]
            steps, losses = unpack(curve["steps"]), unpack(curve["loss"])
            tokens = steps * run["settings"]["context"] * run["settings"]["batch_size"] / 1e6
            axes.plot(tokens, losses, color=colour, linewidth=0.9, alpha=0.8, label=None if index else model)
            if run["failure"] is None:
                highest.append(np.interp(SETTLED * steps[-1], steps, losses))
                lowest.append(np.nanmin(losses))
    axes.set_ylim(min(lowest) - 0.1, max(highest) + 0.1)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("training loss (nats per token)")


def perplexity(comparison: "Comparison", models: Sequence[str], path: Path) -> None:
    """Every run a dot, the median of a model a bar."""
    figure = Figure(figsize=(7, 0.8 + 0.42 * len(models)), layout="constrained")
    axes = figure.subplots()
    for row, model in enumerate(models):
        values = [float(np.exp(run["valid"]["loss"])) for run in comparison.healthy(model)]
        axes.plot(values, [row] * len(values), "o", color=STYLES[0][0], alpha=0.7, markersize=6, zorder=2)
        axes.plot([np.median(values)] * 2, [row - 0.3, row + 0.3], color="black", linewidth=2, zorder=3)
    axes.set_yticks(range(len(models)), models)
    axes.set_ylim(len(models) - 0.4, -0.6)
    axes.set_xlabel("perplexity on the validation text (dots: seeds; bar: median)")
    axes.set_title(comparison.name, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def trade_off(comparison: "Comparison", models: Sequence[str], path: Path) -> None:
    """Loss far beyond the training length against validation loss: the median of a model is a dot."""

    def medians(measure: Callable[[Result], float]) -> list[float]:
        return [float(np.median([measure(run) for run in comparison.healthy(model)])) for model in models]

    far = min(FARTHEST, *(len(run["positions"]["multiples"]) for model in models for run in comparison.healthy(model)))
    xs = medians(lambda run: run["valid"]["loss"])
    ys = medians(lambda run: run["positions"]["multiples"][far - 1])
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    labels = []
    for index, model in enumerate(models):
        # Beyond eight, colours come again with an open marker.
        colour, marker = STYLES[index % len(STYLES)]
        face = colour if index < len(STYLES) else "none"
        label = model.removeprefix(shared_prefix(models)) or model
        axes.plot([xs[index]], [ys[index]], marker, color=colour, markerfacecolor=face, markersize=8, label=model)
        place = (xs[index], ys[index])
        labels.append(axes.annotate(label, place, xytext=(7, 5), textcoords="offset points", fontsize=8))
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.set_xlabel("validation loss (nats per token)")
    axes.set_ylabel(f"loss at {far}× the training length")
    axes.set_title(f"{comparison.name} (lower left is better)", fontsize=10)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    place_labels(figure, axes, labels)
    save_figure(figure, path)


def place_labels(figure: Figure, axes: Axes, labels: Sequence[Annotation]) -> None:
    """Move each label to a side of its dot where it covers no other label or dot and stays inside the axes."""
    figure.draw_without_rendering()  # decides where the axes are
    dots = [axes.transData.transform(label.xy) for label in labels]
    taken = [Bbox.from_bounds(x - DOT, y - DOT, 2 * DOT, 2 * DOT) for x, y in dots]
    for label in labels:
        for x, y, side in ((7, 5, "left"), (-7, 5, "right"), (7, -12, "left"), (-7, -12, "right"), (0, 16, "center")):
            label.set_position((x, y))
            label.set_horizontalalignment(side)
            box = label.get_window_extent()
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def shared_prefix(models: Sequence[str]) -> str:
    """What all names begin with, in whole words."""
    words = [model.split("-") for model in models]
    shared = 0
    while all(len(each) > shared and each[shared] == words[0][shared] for each in words):
        shared += 1
    return "".join(word + "-" for word in words[0][:shared])
