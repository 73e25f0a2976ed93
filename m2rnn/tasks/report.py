"""The results of runs as a table and as a plot."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from m2rnn.runs.plot import STYLES, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = dict[str, Any]

LABELS = 12  # that an axis has room for


def table(run: Results) -> str:
    """Accuracy of one run by length, and a line on its training."""
    lines = [f"{'mixer':<24}{'length':>8}{'all positions':>16}{'last quarter':>15}{'chance':>9}"]
    for length, accuracy in run["accuracy"].items():
        lines.append(
            f"{run['settings']['mixer']:<24}{length:>8}{accuracy['all']:>16.2%}"
            f"{accuracy['last_quarter']:>15.2%}{run['chance']:>9.1%}"
        )
    return "\n".join([*lines, "", f"{run['settings']['mixer']}: {training_line(run)}"])


def comparison_table(runs: Iterable[Results]) -> str:
    """Accuracy over the last quarter of positions, a row a mixer and a column a length, and a sentence that says so.

    Of several seeds the mean, and under it the least.
    """
    grouped = by_mixer(runs)
    first = next(iter(grouped.values()))[0]
    width = max(len("mixer"), *map(len, grouped)) + 2
    lines = [f"{'mixer':<{width}}{'solved':>8}" + "".join(f"{length:>9}" for length in first["accuracy"])]
    most = max(map(len, grouped.values()))
    for mixer, same in grouped.items():
        solved = f"{sum(run['training']['outcome'] == 'solved' for run in same)} of {len(same)}"
        spreads = [spread(same, length, "last_quarter") for length in first["accuracy"]]
        lines.append(f"{mixer:<{width}}{solved:>8}" + "".join(f"{each['mean']:>9.2%}" for each in spreads))
        if most > 1:
            lines.append(f"{'':<{width}}{'least':>8}" + "".join(f"{each['least']:>9.2%}" for each in spreads))
    seeds = f", mean of {most} seeds" if most > 1 else ""
    trained = first["settings"]["train_length"]
    sentence = f"Accuracy over the last quarter of positions{seeds}, by length; training had up to {trained} tokens"
    return "\n".join([*lines, "", f"{sentence}, chance is {first['chance']:.1%}."])


def by_mixer(runs: Iterable[Results]) -> dict[str, list[Results]]:
    """The runs of each mixer, which differ in their seeds."""
    grouped: dict[str, list[Results]] = {}
    for run in runs:
        grouped.setdefault(run["settings"]["mixer"], []).append(run)
    return grouped


def spread(runs: Sequence[Results], length: str, positions: str) -> dict[str, float]:
    """Mean, least and greatest accuracy of the runs."""
    values = [run["accuracy"][length][positions] for run in runs]
    return {"mean": fmean(values), "least": min(values), "greatest": max(values)}


def training_line(run: Results) -> str:
    """How one training went, in a sentence."""
    training = run["training"]
    ending = {
        "solved": f"solved at length {training['length']}",
        "given up": f"not solved; given up at length {training['length']}",
        "step limit": f"not solved; reached length {training['length']}",
        "time limit": f"not solved when the time was up; reached length {training['length']}",
    }[training["outcome"]]
    return (
        f"{ending} of {run['settings']['train_length']} after {training['step']} steps, "
        f"{training['seconds']:.0f} s, {run['parameters']:,} parameters"
    )


def write_plot(path: Path, runs: Sequence[Results]) -> None:
    """Accuracy over the last quarter of positions against length: a line for each mixer's mean over its seeds, in a
    band from the least to the greatest."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    draw(axes, runs, dict(zip(by_mixer(runs), cycle(STYLES), strict=False)))
    seeds = len({run["settings"]["seed"] for run in runs})
    spread_over = f", mean and range of {seeds} seeds" if seeds > 1 else ""
    title = runs[0].get("title") or f"{runs[0]['settings']['group']} word problem"  # as runs of before have it
    axes.set_title(f"{title}{spread_over}")
    axes.set_xlabel("sequence length (tokens)")
    axes.set_ylabel("accuracy, last quarter of positions")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)


def _apart(lengths: Sequence[int]) -> list[str]:
    """Labels of a logarithmic axis, empty where one would run into the label before it."""
    labels, last = [], 0.0
    for length in lengths:
        fits = length >= last * (lengths[-1] / lengths[0]) ** (1 / LABELS)
        labels.append(str(length) if fits else "")
        last = length if fits else last
    return labels


def draw(axes: "Axes", runs: Sequence[Results], styles: Mapping[str, tuple[str, str]]) -> None:
    """The lines and bands of ``write_plot``, with the colour and marker of each mixer."""
    settings, chance = runs[0]["settings"], runs[0]["chance"]
    for rank, (mixer, same) in enumerate(by_mixer(runs).items()):
        colour, marker = styles[mixer]
        lengths = [int(length) for length in same[0]["accuracy"]]
        spreads = [spread(same, str(length), "last_quarter") for length in lengths]
        least, greatest = ([values[name] for values in spreads] for name in ("least", "greatest"))
        width = max(3.5 - rank, 1.0)  # thicker below, thinner above: equal curves stay visible
        axes.fill_between(lengths, least, greatest, color=colour, alpha=0.2, linewidth=0)
        axes.plot(
            lengths,
            [values["mean"] for values in spreads],
            color=colour,
            marker=marker,
            linewidth=width,
            markersize=5 + 1.5 * width,
            label=mixer,
            clip_on=False,
            zorder=3,
        )
    axes.axhline(chance, color="0.5", linestyle=":", label=f"chance ({chance:.1%})")
    axes.axvline(settings["train_length"], color="0.5", linestyle="--", label="longest in training")
    if [*settings["test_lengths"]] == [settings["train_length"]]:  # a logarithmic axis needs a range
        axes.set_xlim(settings["train_length"] / 2, 2 * settings["train_length"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(settings["test_lengths"], _apart(settings["test_lengths"]))
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
