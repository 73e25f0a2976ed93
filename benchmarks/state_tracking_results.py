"""The table and the plot of docs/state-tracking.md, from comparisons that ``m2rnn track`` has left.

    python benchmarks/state_tracking_results.py runs/compare-s3 runs/compare-a5 --plot state-tracking.png

Prints Markdown. A comparison that is not done yet counts with the runs that are.
"""

import argparse
import json
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from m2rnn.runs.plot import STYLES, save_figure
from m2rnn.tasks.report import by_mixer, draw, spread


def runs_in(comparison: Path) -> list[dict[str, Any]]:
    """The results of a comparison's runs, in the order in which its settings name mixers and seeds."""
    try:
        settings = json.loads((comparison / "settings.json").read_text())
    except OSError as error:
        raise SystemExit(f"{comparison} holds no comparison of m2rnn track ({error.strerror})") from None
    # The folders of other seeds are those of a comparison that this one has overwritten.
    runs = [comparison / mixer / f"seed-{seed}" for mixer in settings["mixer"] for seed in settings["seed"]]
    return [json.loads(file.read_text()) for run in runs if (file := run / "results.json").exists()]


def problem(run: dict[str, Any]) -> str:
    settings = run["settings"]
    inputs = "all elements" if settings["inputs"] == "all" else "identity and generators"
    return f"{settings['group']}, {inputs}" + (", growing" if settings["grow_inputs"] else "")


def percent(values: dict[str, float]) -> str:
    mean, least, greatest = (f"{100 * values[name]:.2f}" for name in ("mean", "least", "greatest"))
    return mean if least == greatest else f"{mean} ({least} to {greatest})"


def table(runs: list[dict[str, Any]]) -> str:
    lengths = list(runs[0]["accuracy"])
    lines = [
        f"| mixer | parameters | solved | steps | {' | '.join(f'at {length}, %' for length in lengths)} |",
        f"|---|---|---|---|{'---|' * len(lengths)}",
    ]
    for mixer, same in by_mixer(runs).items():
        trainings = [run["training"] for run in same]
        solved = sorted(training["step"] for training in trainings if training["outcome"] == "solved")
        reached = max(training["length"] for training in trainings)
        steps = " to ".join(f"{n:,}" for n in dict.fromkeys((solved[0], solved[-1]))) if solved else f"length {reached}"
        accuracy = " | ".join(percent(spread(same, length, "last_quarter")) for length in lengths)
        lines.append(f"| {mixer} | {same[0]['parameters']:,} | {len(solved)} of {len(same)} | {steps} | {accuracy} |")
    return "\n".join(lines)


def plot(path: Path, comparisons: list[list[dict[str, Any]]]) -> None:
    """One panel a problem, three in a row, with the same colours in all."""
    columns = min(len(comparisons), 3)
    rows = -(-len(comparisons) // columns)
    figure = Figure(figsize=(3.2 * columns + 2.2, 3.1 * rows + 0.3), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    mixers = dict.fromkeys(run["settings"]["mixer"] for runs in comparisons for run in runs)
    styles = dict(zip(mixers, cycle(STYLES), strict=False))
    for axes, runs in zip(panels, comparisons, strict=False):
        draw(axes, runs, styles)
        axes.set_title(problem(runs[0]), fontsize=9)
        axes.set_xlabel("sequence length (tokens)")
        axes.tick_params(axis="x", labelsize=8, labelrotation=90)
    for axes in panels[len(comparisons) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel("accuracy, last quarter of positions")
    drawn = panels[: len(comparisons)]
    handles, labels = max((axes.get_legend_handles_labels() for axes in drawn), key=lambda found: len(found[0]))
    labels = [label.partition(" (")[0] for label in labels]  # chance differs from panel to panel
    figure.legend(handles, labels, frameon=False, loc="outside right center")
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path, default=Path("state-tracking.png"))
    options = parser.parse_args()
    comparisons = [runs for folder in options.comparison if (runs := runs_in(folder))]
    if not comparisons:
        parser.error("no run in these folders has ended")
    for runs in comparisons:
        print(f"\n{problem(runs[0])}, chance {runs[0]['chance']:.1%}:\n\n{table(runs)}")
    plot(options.plot, comparisons)


if __name__ == "__main__":
    main()
