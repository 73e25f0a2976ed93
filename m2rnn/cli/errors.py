"""How a command ends when something is wrong: one line, an exit status, no traceback."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer

from m2rnn.runs.errors import SettingsError
from m2rnn.runs.folder import RunFolderError, saved_step


def fail(message: str, exit_code: int) -> NoReturn:
    """End with ``message`` on standard error: exit status 2 for a mistake of the user's, 1 for a failure."""
    typer.echo(f"m2rnn: {message}", err=True)
    raise typer.Exit(exit_code)


@contextmanager
def user_errors(
    *mistakes: type[Exception],
    interrupted: str | Callable[[], str],
    once_mended: str = "",
    failures: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """End with one line for what a user, the disk or Ctrl-C did.

    Args:
        mistakes: exceptions that stand for a user's mistake, beside those of settings and of folders of runs.
        interrupted: what to say after Ctrl-C, or a function that says it then.
        once_mended: what to add to an error of the operating system.
        failures: exceptions that say enough themselves and are no mistake of the user's.
    """
    users: tuple[type[Exception], ...] = (SettingsError, RunFolderError, *mistakes)
    try:
        yield
    except users as error:
        fail(str(error), exit_code=2)
    except failures as error:
        fail(str(error), exit_code=1)
    except OSError as error:
        fail(f"{error}{once_mended}", exit_code=1)
    except KeyboardInterrupt:
        fail(interrupted if isinstance(interrupted, str) else interrupted(), exit_code=130)


@contextmanager
def out_of_memory(advice: str) -> Iterator[None]:
    """End with one line, and ``advice``, where the GPU's memory is too small."""
    try:
        yield
    except RuntimeError as error:
        reason = memory_that_lacked(error)
        if reason is None:
            raise
        fail(f"{reason}: {advice}", exit_code=1)


def memory_that_lacked(error: Exception) -> str | None:
    """What torch says of a GPU's memory that was too small, in short; None if the error is another."""
    is_it = type(error).__name__ == "OutOfMemoryError"  # torch's, without importing torch
    return str(error).partition(". ")[0] if is_it else None


def interrupted_run(again: str, folder: Path) -> str:
    """What to say after Ctrl-C: how to go on, and from where."""
    step = saved_step(folder)
    where = "its beginning: no checkpoint was saved" if step is None else f"step {step:,}, which is saved"
    return f"interrupted; {again} resumes the run in {folder}, from {where}"
