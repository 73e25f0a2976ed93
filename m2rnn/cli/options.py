"""Options that several commands have, and how those are read that are more than a number or a word."""

from pathlib import Path
from typing import Annotated

import typer

from m2rnn.runs.errors import SettingsError

Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda if there is one.")]
Dtype = Annotated[
    str, typer.Option(help="Of the weights: float32, bfloat16, float16, float64, or auto: as in the checkpoint.")
]
Field = Annotated[str, typer.Option(help="Field of JSON lines, or column of tables, that holds the text.")]
Glob = Annotated[str, typer.Option(help="Which files of a folder, e.g. '**/*.md'.")]
Separator = Annotated[
    str | None,
    typer.Option(help=r"What ends a document in text files, e.g. '<|endoftext|>' or '\n'; default: a file is one."),
]
RunFolder = Annotated[Path, typer.Option(help="Folder of the run; the same command resumes it.")]
OverwriteRun = Annotated[bool, typer.Option(help="Delete the run in the folder and start anew.")]


def same_command(overwrite: bool) -> str:
    """What goes on with a run, for messages: ``--overwrite`` again would delete it again."""
    return "the same command without --overwrite" if overwrite else "the same command"


def line_ends(separator: str | None) -> str | None:
    r"""``--separator`` with ``\n`` typed as two characters made a line's end."""
    return None if separator is None else separator.replace("\\n", "\n")


def numbers(name: str, text: str, example: str) -> tuple[int, ...]:
    """``"128,256"`` as ``(128, 256)``."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(f"{name} {text!r}: expected whole numbers such as {example}") from None
