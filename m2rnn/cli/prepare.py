"""``m2rnn prepare``: text to token files."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from m2rnn.cli.errors import user_errors
from m2rnn.cli.options import Field, Glob, Separator, line_ends, same_command

Sources = Annotated[
    list[str], typer.Argument(help="Files, folders, globs, or OWNER/NAME of a dataset on the Hugging Face Hub.")
]
Out = Annotated[Path, typer.Option(help="Folder of the token files; the same command goes on.")]
Valid = Annotated[list[str] | None, typer.Option(help="A source of validation text. Repeatable.")]
Test = Annotated[list[str] | None, typer.Option(help="A source of test text. Repeatable.")]
ValidFraction = Annotated[
    float, typer.Option(help="Share of SOURCES' documents to use for validation instead, chosen by their hash.")
]
Tokenizer = Annotated[
    str,
    typer.Option(help="bytes; train-bpe, on SOURCES; or a folder, a tokenizer.json or a name of the Hugging Face Hub."),
]
VocabSize = Annotated[int, typer.Option(help="Token ids of train-bpe.")]
BpeFraction = Annotated[float, typer.Option(help="Share of SOURCES' documents to use for train-bpe.")]
Bos = Annotated[
    bool | None,
    typer.Option(
        help="Whether documents begin with the tokenizer's bos; default as it begins texts. All end with eos."
    ),
]
HubConfig = Annotated[str | None, typer.Option(help="Configuration of a dataset of the Hub.")]
HubSplit = Annotated[str, typer.Option(help="Split of a dataset of the Hub.")]
Processes = Annotated[int | None, typer.Option(help="How many work at once; default one a core.", min=1)]
OnError = Annotated[str, typer.Option(help="Text that cannot be read: fail at the first, or skip all.")]
Overwrite = Annotated[bool, typer.Option(help="Delete the token files in the folder and start anew.")]


def prepare(
    sources: Sources,
    out: Out,
    valid: Valid = None,
    test: Test = None,
    valid_fraction: ValidFraction = 0.0,
    tokenizer: Tokenizer = "bytes",
    vocab_size: VocabSize = 32000,
    bpe_fraction: BpeFraction = 1.0,
    bos: Bos = None,
    field: Field = "text",
    glob: Glob = "**/*",
    separator: Separator = None,
    hub_config: HubConfig = None,
    hub_split: HubSplit = "train",
    processes: Processes = None,
    on_error: OnError = "fail",
    overwrite: Overwrite = False,
) -> None:
    """Turn text into token files for training and evaluation.

    Reads text files (a document each, or --separator), JSON lines (.jsonl, .ndjson, .json) and Parquet; text and JSON
    lines also as .gz, .xz, .bz2 or .zst. The result is the same for any number of processes. Interrupted by
    Ctrl-C or killed, the same command goes on. A manifest says what the folder holds; the tokenizer lies beside it.

    Examples:

    m2rnn prepare corpus.jsonl.zst --valid-fraction 0.01 --out data/corpus

    m2rnn prepare docs/ --glob '**/*.md' --tokenizer train-bpe --vocab-size 8192 --out data/docs

    m2rnn prepare train.parquet --valid valid.parquet --tokenizer gpt2 --out data/gpt2
    """
    again = f"{same_command(overwrite)} goes on in {out}"
    choices = {
        "sources": {"train": sources, "valid": valid or [], "test": test or []},
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "bpe_fraction": bpe_fraction,
        "valid_fraction": valid_fraction,
        "bos": bos,
    }
    reading = {"field": field, "glob": glob, "separator": line_ends(separator)}
    reading |= {"hub_config": hub_config, "hub_split": hub_split}
    options = {"processes": processes, "on_error": on_error, "overwrite": overwrite}
    _prepare(choices, reading, out, options, again)


def _prepare(choices: dict[str, Any], reading: dict[str, Any], out: Path, options: dict[str, Any], again: str) -> None:
    from m2rnn.data.prepare import Settings, table
    from m2rnn.data.prepare import prepare as prepare_text
    from m2rnn.data.sources import DataError, Reading
    from m2rnn.runs.display import Display

    with user_errors(DataError, interrupted=f"interrupted; {again}", once_mended=f". Once that is mended, {again}"):
        settings = Settings(reading=Reading(**reading), **choices)
        with Display(sys.stdout) as display:
            manifest = prepare_text(settings, out, say=display.say, update=display.update, **options)
    typer.echo(table(manifest))
    typer.echo(f"\ntoken files, tokenizer and manifest: {out}")
    run = Path("runs", out.resolve().name)
    typer.echo(f"next: m2rnn train laptop --data {shlex.quote(str(out))} --out {shlex.quote(str(run))}")
