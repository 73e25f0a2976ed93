"""``m2rnn convert``: checkpoints of lm-engine and back, and W cut to a bound."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from m2rnn.cli.errors import fail, user_errors


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
    state_weight_bound: Annotated[
        float | None,
        typer.Option(
            help="Instead of converting, cut the singular values of W in a model of this library, or a swapped one, "
            "e.g. 0.9."
        ),
    ] = None,
    bounded_heads: Annotated[
        int | None, typer.Option(help="How many heads of each layer's W, the first ones, to cut; default all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, without progress.")] = False,
) -> None:
    """Convert a checkpoint of lm-engine to this library's, or back.

    Of model_type gpt_base, with M2RNN and attention layers, with gated MLPs or mixtures of experts. Exact: numbers keep
    their bits and dtypes, only names and the order of rows change, and converting back restores tensors and
    config.json. Tokenizer files are copied. A tensor or a setting that is unknown, missing or of another shape is an
    error that names it, and nothing is written.

    Examples: m2rnn convert hybrid-m2rnn-410m converted, then M2RNNForCausalLM.from_pretrained("converted");
    m2rnn convert converted bounded --state-weight-bound 0.9
    """
    if not source.is_dir():
        fail(f"{source} cannot be read: expected a folder with config.json and safetensors", exit_code=2)
    from m2rnn.convert import ConversionError, cut_state_weights
    from m2rnn.convert import convert as convert_checkpoint
    from m2rnn.runs.display import Display

    interrupted = f"interrupted; nothing was written to {destination}"
    if state_weight_bound is None and bounded_heads is not None:
        fail(f"bounded_heads {bounded_heads}: expected --state-weight-bound with it, such as 0.9", exit_code=2)
    if state_weight_bound is not None and (to or force or mlp_layout != "auto"):
        fail("--state-weight-bound cuts W and converts nothing: leave out --to, --mlp-layout and --force", exit_code=2)
    show = None if as_json else sys.stdout
    done: Any
    with user_errors(ConversionError, interrupted=interrupted), Display(show) as display:
        shared: dict[str, Any] = {"max_shard_size": max_shard_size, "display": display}
        if state_weight_bound is None:
            done = convert_checkpoint(source, destination, to, mlp_layout=mlp_layout, force=force, **shared)
        else:
            done = cut_state_weights(source, destination, state_weight_bound, bounded_heads, **shared)
    typer.echo(json.dumps(done.as_json(), indent=2) if as_json else done.table())
