"""``m2rnn train``: pretraining of language models."""

import os
import sys
import textwrap
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from m2rnn.cli.errors import fail, memory_that_lacked
from m2rnn.cli.options import OverwriteRun, same_command
from m2rnn.runs.errors import SettingsError
from m2rnn.runs.folder import RunFolderError
from m2rnn.training.train_settings import described, load_settings


def settings_help() -> str:
    """What `m2rnn train --help` says of the settings; ``\\b`` keeps the lines as they are."""
    lines = ["\b", "Settings of RECIPE.yaml and KEY=VALUE, with defaults:"]
    for settings, text in described():
        lines += [f"  {settings}", *textwrap.wrap(text, 78, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return "\n".join(lines)


def train(
    recipe: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE.yaml] [KEY=VALUE]...",
            help="A file of settings, such as recipes/laptop.yaml, and settings that differ from it.",
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A model of `m2rnn presets`; or in the recipe.")] = None,
    data: Annotated[str | None, typer.Option(help="The folder that m2rnn prepare made; or in the recipe.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; the same command goes on.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Save and stop after that time; the same command goes on.", min=0)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, schedule and memory, and train nothing.")
    ] = False,
    overwrite: OverwriteRun = False,
) -> None:
    """Train a language model on token files: on a CPU, on a GPU, or on many under torchrun.

    Writes log.jsonl, TensorBoard files and, at the end, results.json, loss.png and model/ for from_pretrained.
    Interrupted by Ctrl-C, killed, or out of disk, the same command goes on from the last checkpoint, also on another
    number of processes. The settings are listed below; a dot reaches into the model, as in
    model.mixer_options.m2rnn.num_heads=8.

    Examples:

    m2rnn train recipes/laptop.yaml --data data/notes --out runs/notes

    m2rnn train --preset hybrid-m2rnn-410m --data data/corpus --dry-run steps=5000 batch_size=256

    torchrun --nproc-per-node 8 -m m2rnn train recipes/7b.yaml --data data/corpus --out runs/7b
    """
    from m2rnn.data.sources import DataError

    process = int(os.environ.get("RANK", "0"))
    is_first = process == 0
    name = "m2rnn: " if is_first else f"m2rnn: process {process}: "
    again = same_command(overwrite)

    def end(message: str, exit_code: int) -> NoReturn:
        if is_first:
            fail(message, exit_code)
        raise typer.Exit(exit_code)

    def end_alone(message: str, exit_code: int) -> NoReturn:
        """End this process, perhaps the only one that failed: the others wait for it, so it must not wait for them."""
        typer.echo(message, err=True)
        if training.is_distributed():
            sys.stderr.flush()
            os._exit(exit_code)  # torchrun then ends the others
        raise typer.Exit(exit_code)

    try:
        overrides = list(recipe or [])
        path = Path(overrides.pop(0)) if overrides and "=" not in overrides[0] else None
        given = {name: value for name, value in (("preset", preset), ("data", data)) if value is not None}
        settings = load_settings(path, overrides, given)
        if out is None and not dry_run:
            raise SettingsError("no --out: give the folder of the run")
    except SettingsError as error:
        end(str(error), exit_code=2)
    try:
        from m2rnn.training import train as training
    except ImportError as error:
        end(f"{error}: training needs pip install 'm2rnn[train]'", exit_code=1)
    from m2rnn.runs.display import Display
    from m2rnn.training.checkpoint import CheckpointError
    from m2rnn.training.monitor import NonFiniteError
    from m2rnn.training.train_report import table

    try:
        if dry_run:
            text = training.dry_run(settings)
            if is_first:
                typer.echo(text)
            return
        assert out is not None
        with Display(sys.stdout if is_first else None) as display:
            results = training.train(settings, out, minutes=minutes, overwrite=overwrite, display=display)
    except (SettingsError, RunFolderError) as error:
        end(str(error), exit_code=2)
    except (CheckpointError, NonFiniteError) as error:
        end(str(error), exit_code=1)
    except training.Stopped as stopped:
        why = "interrupted" if stopped.interrupted else f"stopped after {minutes:g} minutes"
        step = f"step {stopped.step:,} of {settings.steps:,} is saved"
        end(f"{why}: {step}, and {again} goes on from it in {out}", 130 if stopped.interrupted else 0)
    except KeyboardInterrupt:  # the second one
        end_alone(f"{name}interrupted; {again} goes on from the last checkpoint in {out}", exit_code=130)
    except DataError as error:
        end_alone(f"{name}{error}", exit_code=2)
    except OSError as error:
        end_alone(f"{name}{error}. Once that is mended, {again} goes on in {out}", exit_code=1)
    except Exception as error:
        lacked = memory_that_lacked(error)
        if lacked is not None:
            less = "a smaller micro_batch_size, checkpoint_activations=true or, on several GPUs, fsdp=true"
            end_alone(f"{name}{lacked}: {again} goes on with {less}", exit_code=1)
        if not training.is_distributed():
            raise
        end_alone(f"{traceback.format_exc()}{name}failed", exit_code=1)
    finally:
        training.leave_process_group()
    if is_first:
        typer.echo(table(results, out))
        typer.echo(f"\nmodel, results and plot: {out}")
