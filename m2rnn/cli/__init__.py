"""The ``m2rnn`` command: parses, calls, prints. Heavy imports stay inside the commands, so that --help is fast."""

from collections.abc import Callable
from typing import Annotated

import typer

from m2rnn import __version__
from m2rnn.cli.bench import bench
from m2rnn.cli.convert import convert
from m2rnn.cli.evaluate import evaluate
from m2rnn.cli.generate import generate
from m2rnn.cli.prepare import prepare
from m2rnn.cli.presets import presets
from m2rnn.cli.tasks import tasks
from m2rnn.cli.track import track
from m2rnn.cli.train import SettingsAreNoOptions, settings_help, train

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"m2rnn {__version__}")
        raise typer.Exit


@app.callback()
def m2rnn(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """M2RNN: a non-linear recurrent layer with a matrix-valued state."""


COMMANDS: dict[str, Callable[..., None]] = {
    "track": track,
    "presets": presets,
    "prepare": prepare,
    "convert": convert,
    "generate": generate,
}
app.command("train", cls=SettingsAreNoOptions, epilog=settings_help())(train)
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(evaluate, name="eval")
app.add_typer(bench, name="bench")
app.add_typer(tasks, name="tasks")


def main() -> None:
    """The entry point."""
    app()
