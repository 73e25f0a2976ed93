"""``m2rnn eval``: perplexity and benchmarks."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from m2rnn.cli.errors import out_of_memory, user_errors
from m2rnn.cli.options import Device, Dtype, Field, Glob, Separator, line_ends, same_command


def evaluate(
    models: Annotated[list[Path], typer.Argument(help="Folders of Hugging Face causal language models.")],
    data: Annotated[
        str | None,
        typer.Option(help="Text: a file (text, JSON lines, Parquet), a folder of files, or what m2rnn prepare made."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Benchmarks of lm-eval instead, e.g. lambada_openai,longbench,ruler.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results; the same command resumes.")] = Path("runs/eval"),
    context: Annotated[
        str | None,
        typer.Option(
            help="Most tokens that a prediction sees, e.g. 1024,4096,full; full is the whole document. Default 1024. "
            "With --tasks, lengths of the tasks made in any length (RULER)."
        ),
    ] = None,
    windows: Annotated[
        str, typer.Option(help="sliding over each document, or packed: documents end to end, cut as in training.")
    ] = "sliding",
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one sliding window to the next; default half the context.")
    ] = None,
    train_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a training sequence: measure the loss by position beyond them too, and the size of "
            "recurrent states."
        ),
    ] = None,
    beyond: Annotated[int, typer.Option(help="Up to how many times the training length.")] = 8,
    recall: Annotated[
        bool,
        typer.Option(
            "--recall",
            help="Also split the loss into tokens that repeat an earlier n-gram of their document and others, and "
            "measure copying and the loss with attention off.",
        ),
    ] = False,
    recall_ngram: Annotated[
        int | None, typer.Option(help="Tokens before a repeated one that must repeat, too; default 3.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of prepared text: train, valid or test; default valid if there is one.")
    ] = None,
    documents: Annotated[int | None, typer.Option(help="Only the first so many documents.")] = None,
    join: Annotated[bool, typer.Option(help="Take all documents as one, for long contexts.")] = False,
    field: Field = "text",
    glob: Glob = "**/*",
    separator: Separator = None,
    device: Device = None,
    dtype: Dtype = "auto",
    batch: Annotated[
        int | None,
        typer.Option(help="Windows at a time, default 16,384 tokens' worth, or requests of tasks, default 8."),
    ] = None,
    segment: Annotated[
        int, typer.Option(help="Longer windows are read so many tokens at a time, carrying the state; 0 for never.")
    ] = 8192,
    include_path: Annotated[Path | None, typer.Option(help="Folder with more tasks, as lm-eval's YAML files.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many documents of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question of a task.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Most tokens to read of a task's prompt; default the model's own limit, if any.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json instead of the table.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Delete the results in the folder and start anew.")] = False,
) -> None:
    """Measure how well models predict text: loss, perplexity, bits per byte; or run benchmarks.

    Every token but the first of a document is scored once, at each context length; no document sees another. Bits per
    byte compares models of different tokenizers. With --train-length, also the loss by position beyond it, and the
    size of recurrent states. With --recall, how well a model recalls what it has read. Writes results.json, plots and
    every token's loss into the folder. Interrupted, the same command goes on.

    Examples:

    m2rnn eval runs/a/model runs/b/model --data test.jsonl --context 512,2048,8192 --out runs/eval

    m2rnn eval runs/a/model --data data/corpus --train-length 2048 --beyond 8 --join

    m2rnn eval runs/a/model --data data/corpus --recall

    m2rnn eval runs/a/model --tasks lambada_openai,hellaswag --batch 16
    """
    from m2rnn.data.sources import Reading
    from m2rnn.evaluation.perplexity import PerplexitySettings, evaluate_perplexity
    from m2rnn.evaluation.perplexity_report import PLOTS, table
    from m2rnn.runs.display import Display
    from m2rnn.runs.machine import default_device

    interrupted = f"interrupted; {same_command(overwrite)} goes on in {out}"
    advice = f"{same_command(overwrite)} goes on with a smaller --batch or --segment"
    with user_errors(ValueError, interrupted=interrupted), out_of_memory(advice):
        if (data is None) == (tasks is None):
            raise ValueError("expected one of --data, a text, and --tasks, benchmarks")
        of_data = {
            "stride": stride,
            "train_length": train_length,
            "recall": recall or None,
            "recall_ngram": recall_ngram,
            "split": split,
            "documents": documents,
        }
        of_tasks = {
            "include_path": include_path,
            "limit": limit,
            "num_fewshot": num_fewshot,
            "max_length": max_length,
        }
        for name, value in (of_tasks if tasks is None else of_data).items():
            if value is not None:
                belongs = "--tasks" if tasks is None else "--data"
                raise ValueError(f"{name} {value}: expected with {belongs} alone")
        contexts = None if context is None else parse_contexts(context)
        if tasks is not None:
            from m2rnn.evaluation import harness

            if contexts is not None and None in contexts:
                raise ValueError("context full: tasks need numbers")
            chosen = harness.TaskSettings(
                tasks=tuple(tasks.split(",")),
                include_path=None if include_path is None else str(include_path),
                limit=limit,
                num_fewshot=num_fewshot,
                lengths=contexts,  # type: ignore[arg-type] # no None in it
                max_length=max_length,
                batch=batch if batch is not None else 8,
                dtype=dtype,
                device=device or default_device(),
            )
            with Display(sys.stderr) as display:
                results = harness.evaluate_tasks(models, chosen, out, overwrite=overwrite, display=display)
            typer.echo(json.dumps(results, indent=2) if as_json else harness.table(results))
            typer.echo(f"\nresults and every answer: {out}", err=as_json)
            return
        assert data is not None
        if recall_ngram is not None and not recall:
            raise ValueError(f"recall_ngram {recall_ngram}: expected with --recall")
        settings = PerplexitySettings(
            contexts=contexts or (1024,),
            windows=windows,  # type: ignore[arg-type] # checked by PerplexitySettings
            stride=stride,
            train_length=train_length,
            beyond=beyond,
            split=split,
            documents=documents,
            joined=join,
            reading=Reading(field=field, glob=glob, separator=line_ends(separator)),
            dtype=dtype,
            device=device or default_device(),
            batch=batch,
            segment=segment or None,
            recall=recall,
            recall_ngram=3 if recall_ngram is None else recall_ngram,
        )
        with Display(sys.stderr) as display:
            results = evaluate_perplexity(models, data, settings, out, overwrite=overwrite, display=display)
        typer.echo(json.dumps(results, indent=2) if as_json else table(results))
        plots = ", plots" if any((out / name).exists() for name in PLOTS) else ""  # one context makes none
        typer.echo(f"\nresults{plots} and the loss of each token: {out}", err=as_json)


def parse_contexts(text: str) -> tuple[int | None, ...]:
    """``"1024,full"`` as ``(1024, None)``."""
    try:
        return tuple(None if part.strip() == "full" else int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"context {text!r}: expected whole numbers such as 1024,4096, or full") from None
