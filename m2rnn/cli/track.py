"""``m2rnn track``: state tracking, one run or a comparison."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from m2rnn.cli.errors import fail, interrupted_run, user_errors
from m2rnn.cli.options import Device, OverwriteRun, RunFolder, numbers, same_command
from m2rnn.runs.errors import SettingsError
from m2rnn.runs.folder import PLOT
from m2rnn.tasks.settings import RunSettings, TrackSettings

Several = tuple[Sequence[str], Sequence[int], int | None]  # mixers, seeds, runs at a time

DEFAULT = TrackSettings()
DEFAULT_LENGTHS = ",".join(map(str, DEFAULT.test_lengths))

Group = Annotated[str, typer.Option(help="S3, S4, S5, A4, A5, Z<n>, parity, or a product such as S3xZ2.")]
Inputs = Annotated[str, typer.Option(help="Tokens: 'all' elements, or the identity and 'generators'.")]
Mixer = Annotated[
    str,
    typer.Option(
        help="m2rnn, gru, rnn, gated_deltanet, gated_deltanet_negative, gated_deltaproduct2, mamba2 or attention."
    ),
]
Compare = Annotated[str | None, typer.Option(help="Several mixers instead of one, e.g. m2rnn,gru,attention.")]
Seeds = Annotated[str | None, typer.Option(help="Several seeds instead of one, e.g. 0,1,2,3,4.")]
Jobs = Annotated[
    int | None, typer.Option(help="Runs of a comparison at a time, each in a process; default by cores.", min=1)
]
TrainLength = Annotated[int, typer.Option(help="Longest sequence in training.")]
TestLengths = Annotated[str, typer.Option(help="Lengths to measure accuracy at.")]
TestSequences = Annotated[int, typer.Option(help="Sequences of each test length.")]
Curriculum = Annotated[bool, typer.Option(help="Begin with 4 tokens and lengthen whenever they are learnt.")]
GrowBelow = Annotated[float, typer.Option(help="Smoothed loss (nats per token) under which the sequences grow.")]
GrowInputs = Annotated[
    bool, typer.Option(help="Begin with the identity and generators and add elements as they are learnt.")
]
Steps = Annotated[int, typer.Option(help="Most steps to train; ends sooner once solved.")]
Patience = Annotated[
    int | None, typer.Option(help="Give up a run after so many steps before the longest length without growth.")
]
Minutes = Annotated[
    float | None,
    typer.Option(help="Most minutes to train in a run. Where this ends a training is not reproducible.", min=0),
]
DecaySteps = Annotated[
    int, typer.Option(help="Last steps, or those once solved, on which the learning rate goes to zero.")
]
BatchSize = Annotated[int, typer.Option(help="Sequences of a step.")]
LearningRate = Annotated[float, typer.Option(help="AdamW's peak learning rate.")]
Noise = Annotated[
    float,
    typer.Option(help="Largest standard deviation of noise on the embeddings, another for each sequence."),
]
Seed = Annotated[int, typer.Option(help="Determines weights and sequences.")]
Model = Annotated[
    list[str] | None,
    typer.Option(help="Change a field of the model's configuration, e.g. hidden_size=32. Repeatable."),
]
CheckpointEvery = Annotated[int, typer.Option(help="Steps from checkpoint to checkpoint.", min=1)]


def track(
    out: RunFolder,
    group: Group = DEFAULT.group,
    inputs: Inputs = DEFAULT.inputs,
    mixer: Mixer = DEFAULT.mixer,
    compare: Compare = None,
    seeds: Seeds = None,
    jobs: Jobs = None,
    train_length: TrainLength = DEFAULT.train_length,
    test_lengths: TestLengths = DEFAULT_LENGTHS,
    test_sequences: TestSequences = DEFAULT.test_sequences,
    curriculum: Curriculum = DEFAULT.curriculum,
    grow_below: GrowBelow = DEFAULT.grow_below,
    grow_inputs: GrowInputs = DEFAULT.grow_inputs,
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
    """Train on a word problem over a group; accuracy by length.

    The model reads x1 … xT and says after each token what x1 · … · xt is. Writes results.json, the model
    (for from_pretrained), log.jsonl and accuracy-by-length.png into the folder. Interrupted by Ctrl-C or
    killed, the same command goes on with the same result.

    With --compare or --seeds there is a run for each mixer and seed, in folders of their own, --jobs at a time
    (on the GPUs in turn), and results.json and the plot have the mean and the range over the seeds.

    Example: m2rnn track --compare m2rnn,gru,attention --seeds 0,1,2 --jobs 2 --group S3 --out runs/s3
    """
    choices: dict[str, Any] = {
        "group": group, "inputs": inputs, "mixer": mixer, "train_length": train_length, "curriculum": curriculum,
        "grow_below": grow_below, "grow_inputs": grow_inputs, "steps": steps, "patience": patience,
        "decay_steps": decay_steps, "batch_size": batch_size, "learning_rate": learning_rate, "noise": noise,
        "seed": seed, "test_sequences": test_sequences,
    }  # fmt: skip
    again = same_command(overwrite)
    with user_errors(interrupted=lambda: interrupted(again, out, compare or seeds)):
        lengths = numbers("test_lengths", test_lengths, "128,256,512")
        settings = TrackSettings(model=parse_overrides(model or []), test_lengths=lengths, **choices)
        several = several_runs(compare, mixer, seeds, seed, jobs)
        options = {"overwrite": overwrite, "checkpoint_every": checkpoint_every, "minutes": minutes}
        typer.echo(first_line(settings, several))
        run_or_compare(settings, out, several, options, device, again)
        if several is not None and settings.group == "S3":
            typer.echo("next: m2rnn track --compare m2rnn,gru --group A5 --inputs generators --noise 1 --out runs/a5")


def first_line(settings: TrackSettings, several: Several | None) -> str:
    """What is learnt, and how long that takes: a step of 128 sequences of 128 tokens some 0.2 s of a CPU's core."""
    runs = 1 if several is None else len(several[0]) * len(several[1])
    most = settings.steps * settings.train_length * settings.batch_size / 2**14 * 0.2 / 60
    time = "a minute" if most < 1 else f"{most:.0f} minutes"
    each = "At" if runs == 1 else f"{runs} runs, each at"
    return (
        f"learning {settings.group}: after each element, what the product of all so far is. {each} most "
        f"{settings.steps:,} steps, some {time} on a CPU core; one that has learnt it ends sooner"
    )


def run_or_compare(
    settings: RunSettings,
    out: Path,
    several: Several | None,
    options: dict[str, Any],
    device: str | None,
    again: str,
) -> None:
    """One run, or ``several``: the mixers, the seeds, and how many runs at a time."""
    from m2rnn.runs.display import Display
    from m2rnn.runs.machine import default_device
    from m2rnn.tasks.compare import compare
    from m2rnn.tasks.report import comparison_table, table
    from m2rnn.tasks.run import track
    from m2rnn.tasks.training import DivergedError
    from m2rnn.training.checkpoint import CheckpointError

    settings = replace(settings, device=device or default_device())
    try:
        with Display(sys.stdout) as display:
            if several is None:
                report, failed = table(track(settings, out, display=display, **options)), {}
            else:
                mixers, seeds, jobs = several
                results = compare(settings, mixers, seeds, out, jobs=jobs, display=display, **options)
                report, failed = comparison_table(results["runs"].values()), results["failed"]
    except (CheckpointError, DivergedError) as error:
        fail(str(error), exit_code=1)
    typer.echo(report)
    typer.echo(f"\nplot: {out / PLOT}; results and models beside it")
    if failed:
        reasons = "".join(f"\n  {name}: {failure['reason']}" for name, failure in failed.items())
        fail(f"{len(failed)} runs failed (more in results.json); {again} tries them again:{reasons}", 1)


def interrupted(again: str, out: Path, several: str | None) -> str:
    return f"interrupted; {again} resumes all runs in {out}" if several else interrupted_run(again, out)


def several_runs(compare: str | None, mixer: str, seeds: str | None, seed: int, jobs: int | None) -> Several | None:
    """What ``--compare`` and ``--seeds`` ask for; None without both."""
    if compare is None and seeds is None:
        return None
    mixers = [mixer] if compare is None else compare.split(",")
    return mixers, [seed] if seeds is None else numbers("seeds", seeds, "0,1,2,3,4"), jobs


def parse_overrides(pairs: list[str], name_of: str = "model", example: str = "hidden_size=32") -> dict[str, Any]:
    """``["hidden_size=32"]`` as ``{"hidden_size": 32}``; values are YAML."""
    import yaml

    from m2rnn.runs.yaml_values import read_yaml

    overrides = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            overrides[name.strip()] = read_yaml(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise SettingsError(f"{name_of} {pair!r}: expected NAME=VALUE, such as {example}")
    return overrides
