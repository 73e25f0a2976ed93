"""The results of state-tracking runs as a table and as a plot."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from m2rnn.evaluation.plot import STYLES, save_figure

Results = dict[str, Any]


def runs_of(results: Results) -> list[Results]:
    """The runs in a results.json, of one mixer or of several."""
    return list(results["runs"].values()) if "runs" in results else [results]


def table(runs: Sequence[Results]) -> str:
    """Accuracy by length, one row a mixer and length, and a line on each training."""
    lines = [f"{'mixer':<24}{'length':>8}{'all positions':>16}{'last quarter':>15}{'chance':>9}"]
    for run in runs:
        for length, accuracy in run["accuracy"].items():
            lines.append(
                f"{run['settings']['mixer']:<24}{length:>8}{accuracy['all']:>16.2%}"
                f"{accuracy['last_quarter']:>15.2%}{run['chance']:>9.1%}"
            )
    lines.append("")
    return "\n".join([*lines, *(training_line(run) for run in runs)])


def training_line(run: Results) -> str:
    """How one training went, in a sentence."""
    training = run["training"]
    ending = {
        "solved": f"solved at length {training['length']}",
        "step limit": f"not solved; reached length {training['length']}",
        "time limit": f"not solved when the time was up; reached length {training['length']}",
    }[training["outcome"]]
    settings = run["settings"]
    return (
        f"{settings['mixer']}: {ending} of {settings['train_length']} after {training['step']} steps, "
        f"{training['seconds']:.0f} s, {run['parameters']:,} parameters"
    )


def write_plot(path: Path, runs: Sequence[Results]) -> None:
    """Accuracy over the last quarter of positions against length, one line a mixer."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global figure

    settings, chance = runs[0]["settings"], runs[0]["chance"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for rank, (run, (colour, marker)) in enumerate(zip(runs, cycle(STYLES), strict=False)):
        lengths = [int(length) for length in run["accuracy"]]
        values = [accuracy["last_quarter"] for accuracy in run["accuracy"].values()]
        mixer = run["settings"]["mixer"]
        width = max(3.5 - rank, 1.0)  # thicker below, thinner above: equal curves stay visible
        axes.plot(
            lengths,
            values,
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
    axes.set_xscale("log", base=2)
    axes.set_xticks(settings["test_lengths"], [str(length) for length in settings["test_lengths"]])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("sequence length (tokens)")
    axes.set_ylabel("accuracy, last quarter of positions")
    axes.set_title(f"{settings['group']} word problem")
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)
