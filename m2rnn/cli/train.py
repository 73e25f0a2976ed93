"""``m2rnn train``: pretraining of language models."""

import os
import sys
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from m2rnn.cli.errors import fail, interrupted_run, memory_that_lacked
from m2rnn.cli.options import OverwriteRun, same_command
from m2rnn.data.sources import DataError
from m2rnn.data.token_files import read_manifest
from m2rnn.runs.errors import SettingsError
from m2rnn.runs.folder import RunFolderError
from m2rnn.training.train_settings import TrainSettings, described, load_settings


def settings_help() -> str:
    """What `m2rnn train --help` says of the settings; ``\\b`` keeps the lines as they are."""
    lines = ["\b", "Settings of a recipe and KEY=VALUE, with defaults:"]
    for settings, text in described():
        lines += [f"  {settings}", *textwrap.wrap(text, 78, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return "\n".join(lines)


class SettingsAreNoOptions(TyperCommand):
    """``--steps 10`` is answered with ``steps=10``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = {option for parameter in self.params for option in parameter.opts}
        settings = {f"--{each.name}".replace("_", "-"): each.name for each in fields(TrainSettings)}
        for place, argument in enumerate(args):
            option, equals, value = argument.replace("_", "-").partition("=")
            if option in settings and option not in options:
                value = argument.partition("=")[2] if equals else "".join(args[place + 1 : place + 2]) or "…"
                _end(f"{argument}: settings are typed without dashes: {settings[option]}={value}", exit_code=2)
        return super().parse_args(ctx, args)


Recipe = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE]...",
        help="A recipe (laptop, bytes-8min-gpu, 410m, 7b, or a file like theirs), and settings that differ from it.",
    ),
]
Preset = Annotated[str | None, typer.Option(help="A model of `m2rnn presets`; or in the recipe.")]
Data = Annotated[str | None, typer.Option(help="The folder that m2rnn prepare made; or in the recipe.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the run; the same command goes on.")]
Minutes = Annotated[float | None, typer.Option(help="Save and stop after that time; the same command goes on.", min=0)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print sizes, schedule and memory, and train nothing.")]


def train(
    recipe: Recipe = None,
    preset: Preset = None,
    data: Data = None,
    out: Out = None,
    minutes: Minutes = None,
    dry_run: DryRun = False,
    overwrite: OverwriteRun = False,
) -> None:
    """Train a language model on token files.

    On a CPU, on a GPU, or on many under torchrun. Writes log.jsonl, TensorBoard files and, at the end, results.json,
    loss.png and model/ for from_pretrained. Interrupted by Ctrl-C, killed, or out of disk, the same command goes on
    from the last checkpoint, also on another number of processes. The settings are listed below; a dot reaches into the
    model, as in model.mixer_options.m2rnn.num_heads=8.

    Examples:

    m2rnn train laptop --data data/notes --out runs/notes

    m2rnn train --preset hybrid-m2rnn-410m --data data/corpus --dry-run steps=5000 batch_size=256

    torchrun --nproc-per-node 8 -m m2rnn train 7b --data data/corpus --out runs/7b
    """
    try:
        settings = _settings(list(recipe or []), preset, data)
        if out is None and not dry_run:
            raise SettingsError("no --out: give the folder of the run")
        read_manifest(settings.data)  # before torch is imported, which takes seconds
    except (SettingsError, DataError) as error:
        _end(str(error), exit_code=2)
    try:
        from m2rnn.training import train as training
    except ImportError as error:
        _end(f"{error}: training needs pip install 'm2rnn[train]'", exit_code=1)
    from m2rnn.runs.display import Display
    from m2rnn.training.train_report import table

    with _ends_in_one_line(settings, out, same_command(overwrite), minutes):
        if out is None or dry_run:
            report = training.dry_run(settings)
        else:
            with Display(sys.stdout if _is_first() else None) as display:
                results = training.train(settings, out, minutes=minutes, overwrite=overwrite, display=display)
            report = f"{table(results, out)}\n\nmodel, results and plot: {out}"
    if _is_first():
        typer.echo(report)


def _settings(arguments: list[str], preset: str | None, data: str | None) -> TrainSettings:
    path = Path(arguments.pop(0)) if arguments and "=" not in arguments[0] else None
    given = {name: value for name, value in (("preset", preset), ("data", data)) if value is not None}
    return load_settings(path, arguments, given)


@contextmanager
def _ends_in_one_line(settings: TrainSettings, out: Path | None, again: str, minutes: float | None) -> Iterator[None]:
    """End all processes with one line where all know what is wrong, and this one alone where the others may not."""
    from m2rnn.training import train as training
    from m2rnn.training.checkpoint import CheckpointError
    from m2rnn.training.monitor import NonFiniteError

    try:
        yield
    except (SettingsError, RunFolderError) as error:
        _end(str(error), exit_code=2)
    except (CheckpointError, NonFiniteError) as error:
        _end(str(error), exit_code=1)
    except training.Stopped as stopped:
        why = "interrupted" if stopped.interrupted else f"stopped after {minutes:g} minutes"
        step = f"step {stopped.step:,} of {settings.steps:,} is saved"
        _end(f"{why}: {step}, and {again} goes on from it in {out}", 130 if stopped.interrupted else 0)
    except KeyboardInterrupt:  # the second one, or one before the first step
        _end_alone("interrupted" if out is None else interrupted_run(again, out), exit_code=130)
    except DataError as error:
        _end_alone(str(error), exit_code=2)
    except OSError as error:
        _end_alone(f"{error}. Once that is mended, {again} goes on in {out}", exit_code=1)
    except Exception as error:
        lacked = memory_that_lacked(error)
        if lacked is not None:
            less = "a smaller micro_batch_size, checkpoint_activations=true or, on several GPUs, fsdp=true"
            _end_alone(f"{lacked}: {again} goes on with {less}", exit_code=1)
        if not training.is_distributed():
            raise
        typer.echo(traceback.format_exc(), err=True, nl=False)
        _end_alone("failed", exit_code=1)
    finally:
        training.leave_process_group()


def _process() -> int:
    """The number of this process of torchrun's; 0 without."""
    return int(os.environ.get("RANK", "0"))


def _is_first() -> bool:
    return _process() == 0


def _end(message: str, exit_code: int) -> NoReturn:
    """End like all other processes: the first one says why."""
    if _is_first():
        fail(message, exit_code)
    raise typer.Exit(exit_code)


def _end_alone(message: str, exit_code: int) -> NoReturn:
    """End this process, perhaps the only one that failed: the others wait for it, so it must not wait for them."""
    from m2rnn.training.train import is_distributed

    typer.echo(f"m2rnn: {message}" if _is_first() else f"m2rnn: process {_process()}: {message}", err=True)
    if is_distributed():
        sys.stderr.flush()
        os._exit(exit_code)  # torchrun then ends the others
    raise typer.Exit(exit_code)
