"""What the plots share: their colours and how they reach the disk."""

from pathlib import Path
from typing import TYPE_CHECKING

from m2rnn.runs.folder import PARTIAL, force_to_disk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for colour-blind readers, each with a marker of its own; not their yellow.
STYLES = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"),
    ("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X"), ("#8A6BBE", "*"),
)  # fmt: skip


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG that is either whole or not there."""
    partial = path.with_name(path.name + PARTIAL)
    figure.savefig(partial, dpi=150, format="png")
    force_to_disk(partial)
    partial.replace(path)
