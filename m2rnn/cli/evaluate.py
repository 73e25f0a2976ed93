"""``m2rnn eval text`` and ``m2rnn eval tasks``: how well models predict text, and benchmarks."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from m2rnn.cli.errors import fail, out_of_memory, user_errors
from m2rnn.cli.options import Device, Dtype, Field, Glob, Separator, line_ends, numbers, same_command
from m2rnn.data.sources import Reading, find_source
from m2rnn.runs.models import check_model_folders

Models = Annotated[list[Path], typer.Argument(help="Folders of Hugging Face causal language models.")]
Results = Annotated[Path, typer.Option(help="Folder of the results; the same command resumes.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print results.json instead of the table.")]
Overwrite = Annotated[bool, typer.Option(help="Delete the results in the folder and start anew.")]

Data = Annotated[
    str,
    typer.Option(help="Text: a file (text, JSON lines, Parquet), a folder of files, or what m2rnn prepare made."),
]
Contexts = Annotated[
    str,
    typer.Option(help="Most tokens that a prediction sees, e.g. 1024,4096,full; full is the whole document."),
]
WindowKind = Annotated[
    str, typer.Option(help="sliding over each document, or packed: documents end to end, cut as in training.")
]
Stride = Annotated[
    int | None, typer.Option(help="Tokens from one sliding window to the next; default half the context.")
]
TrainLength = Annotated[
    int | None,
    typer.Option(
        help="Tokens of a training sequence: measure the loss by position beyond them too, and the size of "
        "recurrent states."
    ),
]
Beyond = Annotated[int, typer.Option(help="Up to how many times the training length.")]
Recall = Annotated[
    bool,
    typer.Option(
        "--recall",
        help="Also split the loss into tokens that repeat an earlier n-gram of their document and others, and "
        "measure copying and the loss with attention off.",
    ),
]
RecallNgram = Annotated[int | None, typer.Option(help="Tokens before a repeated one that must repeat, too; default 3.")]
Split = Annotated[
    str | None, typer.Option(help="Of prepared text: train, valid or test; default valid if there is one.")
]
Documents = Annotated[int | None, typer.Option(help="Only the first so many documents.")]
Join = Annotated[bool, typer.Option(help="Take all documents as one, for long contexts.")]
WindowsAtOnce = Annotated[int | None, typer.Option(help="Windows at a time, default 16,384 tokens' worth.")]
Segment = Annotated[
    int, typer.Option(help="Longer windows are read so many tokens at a time, carrying the state; 0 for never.")
]

Tasks = Annotated[str, typer.Option(help="Names that lm-eval knows, e.g. lambada_openai,longbench,ruler.")]
Lengths = Annotated[
    str | None, typer.Option("--context", help="Tokens of tasks that are made in any length (RULER), e.g. 4096,16384.")
]
IncludePath = Annotated[Path | None, typer.Option(help="Folder with more tasks, as lm-eval's YAML files.")]
Limit = Annotated[int | None, typer.Option(help="Only the first so many documents of each task.")]
FewShot = Annotated[int | None, typer.Option("--num-fewshot", help="Examples before each question of a task.")]
MaxLength = Annotated[
    int | None, typer.Option(help="Most tokens to read of a task's prompt; default the model's own limit, if any.")
]
RequestsAtOnce = Annotated[int, typer.Option(help="Requests at a time.")]


class _TakesOldSpelling(TyperGroup):
    """``m2rnn eval MODEL --data …`` and ``--tasks …``, from before these were two commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = [_command_meant(args), *args]
        return super().parse_args(ctx, args)


def _command_meant(args: list[str]) -> str:
    given = {argument.partition("=")[0] for argument in args}
    name = "tasks" if "--tasks" in given else "text"
    if ("--data" in given) == ("--tasks" in given) and "--help" not in given:
        fail("expected m2rnn eval text MODEL --data …, or m2rnn eval tasks MODEL --tasks …", exit_code=2)
    typer.echo(f"m2rnn: 'm2rnn eval MODEL' has become two commands; this one is now 'm2rnn eval {name}'", err=True)
    return name


evaluate = typer.Typer(
    cls=_TakesOldSpelling, no_args_is_help=True, help="Measure how well models predict text, or run benchmarks."
)


@evaluate.command()
def text(
    models: Models,
    data: Data,
    out: Results = Path("runs/eval"),
    context: Contexts = "1024",
    windows: WindowKind = "sliding",
    stride: Stride = None,
    train_length: TrainLength = None,
    beyond: Beyond = 8,
    recall: Recall = False,
    recall_ngram: RecallNgram = None,
    split: Split = None,
    documents: Documents = None,
    join: Join = False,
    field: Field = "text",
    glob: Glob = "**/*",
    separator: Separator = None,
    device: Device = None,
    dtype: Dtype = "auto",
    batch: WindowsAtOnce = None,
    segment: Segment = 8192,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure how well models predict text.

    Loss, perplexity, bits per byte. Every token but the first of a document is scored once, at each context length; no
    document sees another. Bits per byte compares models of different tokenizers. With --train-length, also the loss by
    position beyond it, and the size of recurrent states. With --recall, how well a model recalls what it has read.
    Writes results.json, plots and every token's loss into the folder. Interrupted, the same command goes on.

    Examples:

    m2rnn eval text runs/a/model runs/b/model --data test.jsonl --context 512,2048,8192 --out runs/eval

    m2rnn eval text runs/a/model --data data/corpus --train-length 2048 --beyond 8 --join

    m2rnn eval text runs/a/model --data data/corpus --recall
    """
    ngram = {} if recall_ngram is None else {"recall_ngram": recall_ngram}
    choices: dict[str, Any] = {
        "stride": stride,
        "train_length": train_length,
        "beyond": beyond,
        "split": split,
        "dtype": dtype,
    }
    choices |= {"documents": documents, "joined": join, "batch": batch, "segment": segment or None, "recall": recall}
    reading = {"field": field, "glob": glob, "separator": line_ends(separator)}
    with _ends_in_one_line(out, overwrite, "a smaller --batch or --segment"):
        if ngram and not recall:
            raise ValueError(f"recall_ngram {recall_ngram}: expected with --recall")
        check_model_folders(models)
        if not Path(data).is_dir():
            find_source(data, Reading(glob=glob))  # or says that there is nothing
        choices |= {"contexts": parse_contexts(context), "windows": windows, **ngram}
        _evaluate_text(models, data, out, choices, reading, device, as_json, overwrite)


@evaluate.command()
def tasks(
    models: Models,
    tasks: Tasks,
    out: Results = Path("runs/eval"),
    context: Lengths = None,
    include_path: IncludePath = None,
    limit: Limit = None,
    num_fewshot: FewShot = None,
    max_length: MaxLength = None,
    device: Device = None,
    dtype: Dtype = "auto",
    batch: RequestsAtOnce = 8,
    as_json: AsJson = False,
    overwrite: Overwrite = False,
) -> None:
    """Run benchmarks of lm-eval: pip install 'm2rnn[eval]'.

    Scores are lm-eval's own. Writes results.json and every answer into the folder. Interrupted, the same command goes
    on with the tasks that are left.

    Example: m2rnn eval tasks runs/a/model --tasks lambada_openai,hellaswag --batch 16
    """
    with _ends_in_one_line(out, overwrite, "a smaller --batch"):
        check_model_folders(models)
        choices: dict[str, Any] = {
            "tasks": tuple(tasks.split(",")),
            "include_path": None if include_path is None else str(include_path),
            "limit": limit,
            "num_fewshot": num_fewshot,
            "lengths": None if context is None else numbers("context", context, "4096,16384"),
            "max_length": max_length,
            "batch": batch,
            "dtype": dtype,
        }
        _evaluate_tasks(models, out, choices, device, as_json, overwrite)


def _evaluate_text(
    models: list[Path],
    data: str,
    out: Path,
    choices: dict[str, Any],
    reading: dict[str, Any],
    device: str | None,
    as_json: bool,
    overwrite: bool,
) -> None:
    from m2rnn.evaluation.perplexity import PerplexitySettings, evaluate_perplexity
    from m2rnn.evaluation.perplexity_report import PLOTS, table
    from m2rnn.runs.display import Display
    from m2rnn.runs.machine import default_device

    settings = PerplexitySettings(reading=Reading(**reading), device=device or default_device(), **choices)
    with Display(sys.stderr) as display:
        results = evaluate_perplexity(models, data, settings, out, overwrite=overwrite, display=display)
    typer.echo(json.dumps(results, indent=2) if as_json else table(results))
    plots = ", plots" if any((out / name).exists() for name in PLOTS) else ""  # one context makes none
    typer.echo(f"\nresults{plots} and the loss of each token: {out}", err=as_json)


def _evaluate_tasks(
    models: list[Path], out: Path, choices: dict[str, Any], device: str | None, as_json: bool, overwrite: bool
) -> None:
    from m2rnn.evaluation.harness import TaskSettings, evaluate_tasks, table
    from m2rnn.runs.display import Display
    from m2rnn.runs.machine import default_device

    settings = TaskSettings(device=device or default_device(), **choices)
    with Display(sys.stderr) as display:
        results = evaluate_tasks(models, settings, out, overwrite=overwrite, display=display)
    typer.echo(json.dumps(results, indent=2) if as_json else table(results))
    typer.echo(f"\nresults and every answer: {out}", err=as_json)


@contextmanager
def _ends_in_one_line(out: Path, overwrite: bool, less: str) -> Iterator[None]:
    again = same_command(overwrite)
    interrupted = f"interrupted; {again} goes on in {out}"
    with user_errors(ValueError, interrupted=interrupted), out_of_memory(f"{again} goes on with {less}"):
        yield


def parse_contexts(text: str) -> tuple[int | None, ...]:
    """``"1024,full"`` as ``(1024, None)``."""
    try:
        return tuple(None if part.strip() == "full" else int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"context {text!r}: expected whole numbers such as 1024,4096, or full") from None
