"""The map of tasks and mixers: how well each holds beyond its training length, with every seed counted."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from m2rnn.runs.errors import SettingsError
from m2rnn.runs.folder import RESULTS, SETTINGS, read_json
from m2rnn.runs.plot import save_figure

Results = dict[str, Any]

HOLDS = 0.99  # accuracy
HOLDS_AT = 4  # times the training length, or the longest length tested if that is shorter


@dataclass
class Cell:
    """All runs of a mixer on a task: the finished ones, and how many failed."""

    runs: list[Results] = field(default_factory=list)
    failed: int = 0

    @property
    def seeds(self) -> int:
        return len(self.runs) + self.failed

    @property
    def beyond(self) -> float:
        """Mean accuracy beyond the training length; a failed run counts as chance, NaN without any finished one."""
        if not self.runs:
            return float("nan")
        chance = fmean(run["chance"] for run in self.runs)
        return fmean([*map(accuracy_beyond, self.runs), *[chance] * self.failed])

    @property
    def holding(self) -> int:
        """How many seeds hold: see `holds`."""
        return sum(map(holds, self.runs))

    def as_json(self) -> dict[str, Any]:
        return {
            "beyond": self.beyond if self.runs else None,
            "holding": self.holding,
            "seeds": self.seeds,
            "failed": self.failed,
            "by_seed": {str(run["settings"]["seed"]): accuracy_beyond(run) for run in self.runs},
        }


Map = dict[str, dict[str, Cell]]  # by the task's title, then by mixer, both in the order in which they came


def accuracy_beyond(run: Results) -> float:
    """Mean accuracy over the lengths beyond the longest in training; at the longest tested if none is beyond."""
    accuracy, trained = run["accuracy"], run["settings"]["train_length"]
    lengths = [length for length in accuracy if int(length) > trained] or list(accuracy)[-1:]
    return fmean(accuracy[length]["all"] for length in lengths)


def holds(run: Results) -> bool:
    """Whether accuracy is at least `HOLDS` at `HOLDS_AT` times the training length."""
    accuracy, wanted = run["accuracy"], HOLDS_AT * run["settings"]["train_length"]
    length = next((length for length in accuracy if int(length) >= wanted), list(accuracy)[-1])
    return bool(accuracy[length]["all"] >= HOLDS)


def read_map(folders: Iterable[Path]) -> Map:
    """The map of all runs and comparisons in ``folders``, or anywhere below them.

    Raises:
        SettingsError: a folder holds no results.
    """
    cells: Map = {}
    for folder in folders:
        found = [folder / RESULTS] if (folder / RESULTS).exists() else sorted(folder.rglob(RESULTS))
        comparisons = [path.parent for path in found if "runs" in read_json(path)]
        # A comparison's results hold those of its runs.
        files = [path for path in found if not any(parent in path.parents[1:] for parent in comparisons)]
        if not files:
            raise SettingsError(f"{folder}: no {RESULTS} in it; expected finished runs of m2rnn tasks or m2rnn track")
        for file in files:
            _add(cells, file)
    return cells


def _add(cells: Map, file: Path) -> None:
    results = read_json(file)
    runs = list(results["runs"].values()) if "runs" in results else [results]
    for run in runs:
        cells.setdefault(title(run), {}).setdefault(run["settings"]["mixer"], Cell()).runs.append(run)
    for name in results.get("failed", {}):
        settings = read_json(file.parent / SETTINGS)
        task = title(runs[0]) if runs else settings.get("task") or f"{settings['group']} word problem"
        cells.setdefault(task, {}).setdefault(name.rpartition("/")[0], Cell()).failed += 1


def title(run: Results) -> str:
    """What a run was on: the title of its results, or of older ones the group."""
    return str(run.get("title") or f"{run['settings']['group']} word problem")


def mixers_of(cells: Map) -> list[str]:
    """All mixers, in the order in which they came."""
    return list(dict.fromkeys(mixer for row in cells.values() for mixer in row))


def map_table(cells: Map) -> str:
    """A line for each task: mean accuracy beyond the training length by mixer, and how many seeds hold."""
    mixers = mixers_of(cells)
    wide = max(len(task) for task in cells) + 2
    columns = [max(len(mixer), len("100.0% 5/5")) + 2 for mixer in mixers]
    lines = [" " * wide + "".join(f"{mixer:>{width}}" for mixer, width in zip(mixers, columns, strict=True))]
    for task, row in cells.items():
        texts = (_text(row.get(mixer)).replace("\n", " ") for mixer in mixers)
        lines.append(
            f"{task:<{wide}}" + "".join(f"{text:>{width}}" for text, width in zip(texts, columns, strict=True))
        )
    note = f"mean accuracy beyond the training length; seeds with at least {HOLDS:.0%} at {HOLDS_AT} times it, of all"
    return "\n".join([*lines, "", note])


def _text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    accuracy = f"{cell.beyond:.1%}" if cell.runs else "failed"
    return f"{accuracy}\n{cell.holding}/{cell.seeds}"


def draw_map(path: Path, cells: Map) -> None:
    """The map as a picture: tasks downwards, mixers across, coloured by accuracy beyond the training length."""
    from matplotlib.figure import Figure

    mixers: Sequence[str] = mixers_of(cells)
    # A map of one task is still as high as the colour bar's label is long, one of one mixer as wide as the note below.
    size = (max(2.6 + 1.1 * len(mixers), 5.0), max(1.6 + 0.45 * len(cells), 3.0))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    values = [[row[mixer].beyond if mixer in row else float("nan") for mixer in mixers] for row in cells.values()]
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(cells.values()):
        for x, mixer in enumerate(mixers):
            dark = mixer in row and row[mixer].beyond < 0.5
            axes.text(x, y, _text(row.get(mixer)), ha="center", va="center", color="w" if dark else "k", fontsize=7)
    axes.set_xticks(range(len(mixers)), mixers, rotation=30, ha="left", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(cells)), list(cells), fontsize=8)
    axes.tick_params(top=True, bottom=False, labeltop=True, labelbottom=False, length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, format=lambda value, _: f"{value:.0%}")
    bar.set_label("accuracy beyond the training length", fontsize=8)
    axes.set_xlabel(f"below each: seeds with at least {HOLDS:.0%} at {HOLDS_AT} times the training length", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
