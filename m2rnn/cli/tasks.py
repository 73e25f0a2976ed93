"""``m2rnn tasks``: synthetic problems with exact answers, one run or a comparison."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from m2rnn.cli.errors import user_errors
from m2rnn.cli.options import Device, OverwriteRun, RunFolder, numbers, same_command
from m2rnn.cli.track import (
    DEFAULT,
    BatchSize,
    CheckpointEvery,
    Compare,
    Curriculum,
    DecaySteps,
    GrowBelow,
    Jobs,
    LearningRate,
    Minutes,
    Mixer,
    Model,
    Noise,
    Patience,
    Seed,
    Seeds,
    Steps,
    TestSequences,
    interrupted,
    parse_overrides,
    run_or_compare,
    several_runs,
)

tasks = typer.Typer(help="Synthetic tasks: train and test by length.")

Task = Annotated[str, typer.Argument(help="A name from m2rnn tasks list, a group, or a path ending in .py.")]
Option = Annotated[
    list[str] | None, typer.Option("--option", help="Change a field of the task, e.g. modulus=7. Repeatable.")
]
TrainLength = Annotated[int | None, typer.Option(help="Longest sequence in training; default: the task's.")]
TestLengths = Annotated[str | None, typer.Option(help="Lengths to measure accuracy at; default: the task's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@tasks.callback(invoke_without_command=True)
def _list_by_default(context: typer.Context) -> None:
    """Synthetic tasks with exact answers."""
    if context.invoked_subcommand is None:
        list_tasks()


@tasks.command("list")
def list_tasks(as_json: AsJson = False) -> None:
    """List the tasks and their lengths; --json adds their sources.

    Beside them, every group is a task, such as S5 or Z60, and so is a file of your own: m2rnn.tasks.problems.contract
    says what it has to define.
    """
    from m2rnn.tasks.problems import PROBLEMS, describe

    known = [describe(name) for name in PROBLEMS]
    if as_json:
        typer.echo(json.dumps(known, indent=2))
        return
    typer.echo(f"{'task':<29}{'tokens':>7}{'trained to':>12}{'tested to':>11}  what the model has to do")
    for task in known:
        typer.echo(
            f"{task['name']:<29}{task['vocab_size']:>7}{task['train_lengths'][1]:>12}{task['test_lengths'][-1]:>11}"
            f"  {task['summary']}"
        )


@tasks.command("run")
def run_task(
    task: Task,
    out: RunFolder,
    option: Option = None,
    mixer: Mixer = DEFAULT.mixer,
    compare: Compare = None,
    seeds: Seeds = None,
    jobs: Jobs = None,
    train_length: TrainLength = None,
    test_lengths: TestLengths = None,
    test_sequences: TestSequences = DEFAULT.test_sequences,
    curriculum: Curriculum = DEFAULT.curriculum,
    grow_below: GrowBelow = DEFAULT.grow_below,
    steps: Steps = DEFAULT.steps,
    patience: Patience = DEFAULT.patience,
    minutes: Minutes = None,
    decay_steps: DecaySteps = DEFAULT.decay_steps,
    batch_size: BatchSize = DEFAULT.batch_size,
    learning_rate: LearningRate = DEFAULT.learning_rate,
    noise: Noise = DEFAULT.noise,
    seed: Seed = DEFAULT.seed,
    model: Model = None,
    device: Device = None,
    checkpoint_every: CheckpointEvery = 100,
    overwrite: OverwriteRun = False,
) -> None:
    """Train on a task; accuracy by length.

    Writes results.json, the model, log.jsonl and accuracy-by-length.png into the folder, as m2rnn track does.
    Interrupted by Ctrl-C or killed, the same command goes on with the same result.

    Example: m2rnn tasks run flip_flop --compare m2rnn,gru,attention --seeds 0,1,2 --jobs 2 --out runs/flip-flop
    """
    choices: dict[str, Any] = {
        "mixer": mixer, "curriculum": curriculum, "grow_below": grow_below, "steps": steps, "patience": patience,
        "decay_steps": decay_steps, "batch_size": batch_size, "learning_rate": learning_rate, "noise": noise,
        "seed": seed, "test_sequences": test_sequences, "train_length": train_length,
    }  # fmt: skip
    options = {"overwrite": overwrite, "checkpoint_every": checkpoint_every, "minutes": minutes}
    several = (compare, mixer, seeds, seed, jobs)
    with user_errors(interrupted=lambda: interrupted(same_command(overwrite), out, compare or seeds)):
        _run(task, out, option or [], test_lengths, model or [], choices, several, options, device)


def _run(
    task: str,
    out: Path,
    option: list[str],
    test_lengths: str | None,
    model: list[str],
    choices: dict[str, Any],
    several: tuple[Any, ...],
    options: dict[str, Any],
    device: str | None,
) -> None:
    from m2rnn.tasks.settings import task_settings

    settings = task_settings(
        task,
        parse_overrides(option, "option", "modulus=7"),
        model=parse_overrides(model),
        test_lengths=None if test_lengths is None else numbers("test_lengths", test_lengths, "128,256,512"),
        **choices,
    )
    run_or_compare(settings, out, several_runs(*several), options, device, same_command(options["overwrite"]))


@tasks.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs and comparisons, or of many of them.")],
    out: Annotated[Path | None, typer.Option(help="Also draw the map, into this PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Map tasks and mixers by their results.

    Mean accuracy beyond the training length, over all seeds, and how many seeds hold it: at least 99% at four times
    the training length. A failed run counts as a seed, with the accuracy of chance.

    Example: m2rnn tasks report runs/tasks --out map.png
    """
    from m2rnn.tasks.map import draw_map, map_table, read_map

    with user_errors(interrupted="interrupted"):
        cells = read_map(folders)
        if out is not None:
            draw_map(out, cells)
        found = {task: {mixer: cell.as_json() for mixer, cell in row.items()} for task, row in cells.items()}
        typer.echo(json.dumps(found, indent=2) if as_json else map_table(cells))
