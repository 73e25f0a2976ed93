"""``m2rnn convert``: checkpoints of lm-engine and back."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from m2rnn.cli.errors import user_errors


def convert(
    source: Annotated[Path, typer.Argument(help="Folder with config.json and safetensors, in one file or shards.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write, new or empty.")],
    to: Annotated[
        str | None, typer.Option(help="m2rnn or lm-engine; by default the format that the source does not have.")
    ] = None,
    mlp_layout: Annotated[
        str,
        typer.Option(
            help="How lm-engine's side stores gate and up of an MLP: interleaved (gate first), halves (up first), or "
            "auto: as its config.json tells."
        ),
    ] = "auto",
    max_shard_size: Annotated[
        str, typer.Option(help="Of one weights file, e.g. 500MB or 2GB; about as much memory is used.")
    ] = "2GB",
    force: Annotated[bool, typer.Option(help="Replace a model in the destination.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, without progress.")] = False,
) -> None:
    """Convert a checkpoint of lm-engine (model_type gpt_base) to this library's format, or back.

    M2RNN and attention layers, with gated MLPs or mixtures of experts. Exact: numbers keep their bits and dtypes, only
    names and the order of rows change, and converting back restores tensors and config.json. Tokenizer files are
    copied. A tensor or a setting that is unknown, missing or of another shape is an error that names it, and nothing is
    written.

    Example: m2rnn convert hybrid-m2rnn-410m converted, then M2RNNForCausalLM.from_pretrained("converted")
    """
    from m2rnn.convert import ConversionError
    from m2rnn.convert import convert as convert_checkpoint
    from m2rnn.training.display import Display

    interrupted = f"interrupted; nothing was written to {destination}"
    show = None if as_json else sys.stdout
    with user_errors(ConversionError, interrupted=interrupted), Display(show) as display:
        done = convert_checkpoint(
            source,
            destination,
            to,
            mlp_layout=mlp_layout,
            force=force,
            max_shard_size=max_shard_size,
            display=display,
        )
    typer.echo(json.dumps(done.as_json(), indent=2) if as_json else done.table())
