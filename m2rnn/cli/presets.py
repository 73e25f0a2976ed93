"""``m2rnn presets``: the models by name."""

from typing import Annotated

import typer

from m2rnn.cli.errors import fail


def presets(
    name: Annotated[str | None, typer.Argument(help="Show this preset alone, with its layers.")] = None,
    only: Annotated[str, typer.Option("--filter", help="List presets whose names contain this, e.g. 7b.")] = "",
    context: Annotated[int, typer.Option(help="Tokens of a training sequence, for the work of attention.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the whole configuration of NAME.")] = False,
) -> None:
    """List the models by name, with their sizes.

    Parameters, state, cache and work of training. Active parameters are those that a token uses: without the experts
    that it does not take. Recurrent state and KV cache count numbers, not bytes. Work is floating-point operations per
    token of a forward and a backward pass; docs/models.md has the formula.

    Example: m2rnn presets --filter hybrid-gdn
    """
    from m2rnn.evaluation import preset_report
    from m2rnn.models.presets import names as preset_names

    try:
        if name is not None:
            typer.echo(preset_report.as_json(name, context) if as_json else preset_report.detail(name, context))
            return
        names = [known for known in preset_names() if only in known]
        if not names:
            raise ValueError(f"no preset's name contains {only!r}; known: {', '.join(preset_names())}")
        lines = preset_report.json_lines(names, context) if as_json else preset_report.table_lines(names, context)
        for line in lines:
            typer.echo(line)
    except ValueError as error:
        fail(str(error), exit_code=2)
