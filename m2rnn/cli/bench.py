"""``m2rnn bench``: speed and memory."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from m2rnn.cli.errors import fail, user_errors
from m2rnn.cli.options import Device

bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory.")


@bench.command()
def op(
    out: Annotated[Path, typer.Option(help="Folder of the results; what it holds is not measured again.")] = Path(
        "runs/bench-op"
    ),
    shapes: Annotated[
        str | None, typer.Option(help="Problems, e.g. B8T4096N84,B4T4096N66K64V32; K is 64 and V 16 unless given.")
    ] = None,
    backends: Annotated[
        str | None, typer.Option(help="Some of cuda, triton, cpu, reference, sdpa, gated_deltanet.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="A few seconds: one shape, few repeats, short sweeps.")] = False,
    sweep: Annotated[bool, typer.Option(help="Also time against length and batch, and plot it.")] = True,
    device: Device = None,
) -> None:
    """Time and memory of the recurrence.

    Forward, forward and backward, one decode step. Each backend beside PyTorch's causal attention and fla's Gated
    DeltaNet, with the least time that the device's peak rates allow. Without a GPU the shapes are small ones. Writes
    op.csv, op.json and op-time.png into the folder. Interrupted, the same command goes on; results of other hardware or
    versions are measured anew.

    Example: m2rnn bench op --out runs/bench-op
    """
    from m2rnn.bench.operator import BenchError, bench_op
    from m2rnn.bench.report import table
    from m2rnn.runs.display import Display
    from m2rnn.runs.machine import default_device

    interrupted = f"interrupted; the same command goes on in {out}"
    try:
        with user_errors(interrupted=interrupted), Display(sys.stdout) as display:
            rows = bench_op(
                out,
                device=device or default_device(),
                shapes=shapes,
                backends=backends,
                quick=quick,
                sweep=sweep,
                display=display,
            )
    except BenchError as error:
        fail(str(error), exit_code=1)
    typer.echo(table(rows))
    typer.echo(f"\nresults{' and plot' if sweep else ''}: {out}")
