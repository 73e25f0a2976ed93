"""``m2rnn track``: state tracking, one run or a comparison."""

import sys
from typing import Annotated, Any

import typer

from m2rnn.cli.errors import fail, user_errors
from m2rnn.cli.options import Device, OverwriteRun, RunFolder, numbers, same_command
from m2rnn.runs.errors import SettingsError
from m2rnn.tasks.settings import TrackSettings

DEFAULT = TrackSettings()


def track(
    out: RunFolder,
    group: Annotated[
        str, typer.Option(help="S3, S4, S5, A4, A5, Z<n>, parity, or a product such as S3xZ2.")
    ] = DEFAULT.group,
    inputs: Annotated[
        str, typer.Option(help="Tokens: 'all' elements, or the identity and 'generators'.")
    ] = DEFAULT.inputs,
    mixer: Annotated[
        str,
        typer.Option(
            help="m2rnn, gru, rnn, gated_deltanet, gated_deltanet_negative, gated_deltaproduct2, mamba2 or attention."
        ),
    ] = DEFAULT.mixer,
    compare: Annotated[
        str | None, typer.Option(help="Several mixers instead of one, e.g. m2rnn,gru,attention.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Several seeds instead of one, e.g. 0,1,2,3,4.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs of a comparison at a time, each in a process of its own.", min=1)] = 1,
    train_length: Annotated[int, typer.Option(help="Longest sequence in training.")] = DEFAULT.train_length,
    test_lengths: Annotated[str, typer.Option(help="Lengths to measure accuracy at.")] = ",".join(
        map(str, DEFAULT.test_lengths)
    ),
    test_sequences: Annotated[int, typer.Option(help="Sequences of each test length.")] = DEFAULT.test_sequences,
    curriculum: Annotated[
        bool, typer.Option(help="Begin with 4 tokens and lengthen whenever they are learnt.")
    ] = DEFAULT.curriculum,
    grow_below: Annotated[
        float, typer.Option(help="Smoothed loss (nats per token) under which the sequences grow.")
    ] = DEFAULT.grow_below,
    grow_inputs: Annotated[
        bool, typer.Option(help="Begin with the identity and generators and add elements as they are learnt.")
    ] = DEFAULT.grow_inputs,
    steps: Annotated[int, typer.Option(help="Most steps to train; ends sooner once solved.")] = DEFAULT.steps,
    patience: Annotated[
        int | None, typer.Option(help="Give up a run after so many steps before the longest length without growth.")
    ] = DEFAULT.patience,
    minutes: Annotated[
        float | None,
        typer.Option(help="Most minutes to train in a run. Where this ends a training is not reproducible.", min=0),
    ] = None,
    decay_steps: Annotated[
        int, typer.Option(help="Last steps, or those once solved, on which the learning rate goes to zero.")
    ] = DEFAULT.decay_steps,
    batch_size: Annotated[int, typer.Option(help="Sequences of a step.")] = DEFAULT.batch_size,
    learning_rate: Annotated[float, typer.Option(help="AdamW's peak learning rate.")] = DEFAULT.learning_rate,
    noise: Annotated[
        float,
        typer.Option(help="Largest standard deviation of noise on the embeddings, another for each sequence."),
    ] = DEFAULT.noise,
    seed: Annotated[int, typer.Option(help="Determines weights and sequences.")] = DEFAULT.seed,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Change a field of the model's configuration, e.g. hidden_size=32. Repeatable."),
    ] = None,
    device: Device = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps from checkpoint to checkpoint.", min=1)] = 100,
    overwrite: OverwriteRun = False,
) -> None:
    """Train on a word problem over a group and measure accuracy by length.

    The model reads x1 … xT and says after each token what x1 · … · xt is. Writes results.json, the model
    (for from_pretrained), log.jsonl and accuracy-by-length.png into the folder. Interrupted by Ctrl-C or
    killed, the same command goes on with the same result.

    With --compare or --seeds there is a run for each mixer and seed, in folders of their own, --jobs at a time
    (on the GPUs in turn), and results.json and the plot have the mean and the range over the seeds.

    Example: m2rnn track --compare m2rnn,gru,attention --seeds 0,1,2 --jobs 2 --group S3 --out runs/s3
    """
    from m2rnn.runs.display import Display
    from m2rnn.runs.machine import default_device
    from m2rnn.tasks.compare import compare as compare_runs
    from m2rnn.tasks.report import comparison_table, table
    from m2rnn.tasks.run import track as track_one
    from m2rnn.tasks.training import DivergedError
    from m2rnn.training.checkpoint import CheckpointError

    failures = (CheckpointError, DivergedError)
    again = same_command(overwrite)
    with user_errors(interrupted=f"interrupted; {again} resumes the run in {out}", failures=failures):
        settings = TrackSettings(
            group=group,
            inputs=inputs,  # type: ignore[arg-type] # checked by TrackSettings
            mixer=mixer,
            model=parse_overrides(model or []),
            train_length=train_length,
            curriculum=curriculum,
            grow_below=grow_below,
            grow_inputs=grow_inputs,
            steps=steps,
            patience=patience,
            decay_steps=decay_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            noise=noise,
            seed=seed,
            test_lengths=numbers("test_lengths", test_lengths, "128,256,512"),
            test_sequences=test_sequences,
            device=device or default_device(),
        )
        with Display(sys.stdout) as display:
            options: dict[str, Any] = {
                "overwrite": overwrite,
                "checkpoint_every": checkpoint_every,
                "minutes": minutes,
                "display": display,
            }
            if compare is None and seeds is None:
                results = track_one(settings, out, **options)
                report, failed = table(results), {}
            else:
                mixers = [mixer] if compare is None else compare.split(",")
                all_seeds = [seed] if seeds is None else numbers("seeds", seeds, "0,1,2,3,4")
                results = compare_runs(settings, mixers, all_seeds, out, jobs=jobs, **options)
                report, failed = comparison_table(results["runs"].values()), results["failed"]
    typer.echo(report)
    typer.echo(f"\nresults, models and plot: {out}")
    if failed:
        reasons = "".join(f"\n  {name}: {failure['reason']}" for name, failure in failed.items())
        fail(f"{len(failed)} runs failed (more in results.json); {again} tries them again:{reasons}", 1)


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
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
            raise SettingsError(f"model {pair!r}: expected NAME=VALUE, such as hidden_size=32")
    return overrides
