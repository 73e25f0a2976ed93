"""The ``m2rnn`` command: parses, calls, prints. Heavy imports stay inside, so that --help is fast."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from m2rnn.data.run_folder import RunFolderError
from m2rnn.training.track_settings import SettingsError, TrackSettings

if TYPE_CHECKING:
    from m2rnn.data.sources import Reading

DEFAULT = TrackSettings()

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory.")
app.add_typer(bench, name="bench")


@app.callback()
def m2rnn() -> None:
    """M2RNN: a non-linear recurrent layer with a matrix-valued state."""


@app.command()
def track(
    out: Annotated[Path, typer.Option(help="Folder of the run; the same command resumes it.")],
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
        typer.Option(help="Most minutes to train in a run. Where this ends a training is not reproducible."),
    ] = None,
    decay_steps: Annotated[
        int, typer.Option(help="Last steps, or those once solved, on which the learning rate goes to zero.")
    ] = DEFAULT.decay_steps,
    batch_size: Annotated[int, typer.Option(help="Sequences of a step.")] = DEFAULT.batch_size,
    learning_rate: Annotated[float, typer.Option(help="AdamW's peak learning rate.")] = DEFAULT.learning_rate,
    seed: Annotated[int, typer.Option(help="Determines weights and sequences.")] = DEFAULT.seed,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Change a field of the model's configuration, e.g. hidden_size=32. Repeatable."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda if there is one.")] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps from checkpoint to checkpoint.", min=1)] = 100,
    overwrite: Annotated[bool, typer.Option(help="Delete the run in the folder and start anew.")] = False,
) -> None:
    """Train on a word problem over a group and measure accuracy by length.

    The model reads x1 … xT and says after each token what x1 · … · xt is. Writes results.json, the model
    (for from_pretrained), log.jsonl and accuracy-by-length.png into the folder. Interrupted by Ctrl-C or
    killed, the same command goes on with the same result.

    With --compare or --seeds there is a run for each mixer and seed, in folders of their own, --jobs at a time
    (on the GPUs in turn), and results.json and the plot have the mean and the range over the seeds.

    Example: m2rnn track --compare m2rnn,gru,attention --seeds 0,1,2 --jobs 2 --group S3 --out runs/s3
    """
    from m2rnn.evaluation.machine import default_device
    from m2rnn.evaluation.track import track as track_one
    from m2rnn.evaluation.track_compare import compare as compare_runs
    from m2rnn.evaluation.track_report import comparison_table, table
    from m2rnn.training.display import Display

    try:
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
            seed=seed,
            test_lengths=parse_numbers("test_lengths", test_lengths, "128,256,512"),
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
                mixers = (compare or mixer).split(",")
                numbers = [seed] if seeds is None else parse_numbers("seeds", seeds, "0,1,2,3,4")
                results = compare_runs(settings, mixers, numbers, out, jobs=jobs, **options)
                report, failed = comparison_table(results["runs"].values()), results["failed"]
    except (SettingsError, RunFolderError) as error:
        fail(str(error), exit_code=2)
    except OSError as error:
        fail(str(error), exit_code=1)
    except KeyboardInterrupt:
        fail(f"interrupted; the same command resumes the run in {out}", exit_code=130)
    typer.echo(report)
    typer.echo(f"\nresults, models and plot: {out}")
    if failed:
        reasons = "".join(f"\n  {name}: {failure['reason']}" for name, failure in failed.items())
        fail(f"{len(failed)} runs failed (more in results.json); the same command tries them again:{reasons}", 1)


@app.command("train")
def train_model(
    recipe: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE.yaml] [KEY=VALUE]...",
            help="A file of settings, such as recipes/laptop.yaml, and settings that differ from it.",
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A model of `m2rnn presets`; or in the recipe.")] = None,
    data: Annotated[str | None, typer.Option(help="The folder that m2rnn prepare made; or in the recipe.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; the same command goes on.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Save and stop after that time; the same command goes on.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, schedule and memory, and train nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Delete the run in the folder and start anew.")] = False,
) -> None:
    """Train a language model on token files: on a CPU, on a GPU, or on many under torchrun.

    Writes log.jsonl, TensorBoard files and, at the end, results.json, loss.png and model/ for from_pretrained.
    Interrupted by Ctrl-C, killed, or out of disk, the same command goes on from the last checkpoint, also on another
    number of processes. docs/training.md lists the settings; a dot reaches into the model, as in
    model.mixer_options.m2rnn.num_heads=8.

    Examples:

    m2rnn train recipes/laptop.yaml --data data/notes --out runs/notes

    m2rnn train --preset hybrid-m2rnn-410m --data data/corpus --dry-run steps=5000 batch_size=256

    torchrun --nproc-per-node 8 -m m2rnn.cli train recipes/7b.yaml --data data/corpus --out runs/7b
    """
    import os

    from m2rnn.data.sources import DataError
    from m2rnn.training.train_settings import load_settings

    process = int(os.environ.get("RANK", "0"))
    is_first = process == 0

    def end(message: str, exit_code: int) -> NoReturn:
        if is_first:
            fail(message, exit_code)
        raise typer.Exit(exit_code)

    try:
        overrides = list(recipe or [])
        path = Path(overrides.pop(0)) if overrides and "=" not in overrides[0] else None
        given = {name: value for name, value in (("preset", preset), ("data", data)) if value is not None}
        settings = load_settings(path, overrides, given)
        if out is None and not dry_run:
            raise SettingsError("no --out: give the folder of the run")
    except SettingsError as error:
        end(str(error), exit_code=2)
    try:
        from m2rnn.training import train as training
    except ImportError as error:
        end(f"{error}: training needs pip install 'm2rnn[train]'", exit_code=1)
    from m2rnn.training.checkpoint import CheckpointError
    from m2rnn.training.display import Display
    from m2rnn.training.monitor import NonFiniteError
    from m2rnn.training.train_report import table

    try:
        if dry_run:
            text = training.dry_run(settings)
            if is_first:
                typer.echo(text)
            return
        assert out is not None
        with Display(sys.stdout if is_first else None) as display:
            results = training.train(settings, out, minutes=minutes, overwrite=overwrite, display=display)
    except (SettingsError, RunFolderError) as error:
        end(str(error), exit_code=2)
    except DataError as error:  # perhaps of this process alone
        fail(str(error) if is_first else f"process {process}: {error}", exit_code=2)
    except (CheckpointError, NonFiniteError) as error:
        end(str(error), exit_code=1)
    except training.Stopped as stopped:
        why = "interrupted" if stopped.interrupted else f"stopped after {minutes:g} minutes"
        step = f"step {stopped.step:,} of {settings.steps:,} is saved"
        end(f"{why}: {step}, and the same command goes on from it in {out}", 130 if stopped.interrupted else 0)
    except KeyboardInterrupt:
        end(f"interrupted; the same command goes on from the last checkpoint in {out}", exit_code=130)
    except OSError as error:
        fail(f"{error}. Once that is mended, the same command goes on in {out}", exit_code=1)
    finally:
        training.leave_process_group()
    if is_first:
        typer.echo(table(results, out))
        typer.echo(f"\nmodel, results and plot: {out}")


@app.command("presets")
def list_presets(
    name: Annotated[str | None, typer.Argument(help="Show this preset alone, with its layers.")] = None,
    only: Annotated[str, typer.Option("--filter", help="List presets whose names contain this, e.g. 7b.")] = "",
    context: Annotated[int, typer.Option(help="Tokens of a training sequence, for the work of attention.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the whole configuration of NAME.")] = False,
) -> None:
    """List the models by name: parameters, state, cache and work of training.

    Active parameters are those that a token uses: without the experts that it does not take. Recurrent state and
    KV cache count numbers, not bytes. Work is floating-point operations per token of a forward and a backward pass;
    docs/models.md has the formula.

    Example: m2rnn presets --filter hybrid-gdn
    """
    from m2rnn.evaluation import preset_report
    from m2rnn.models import presets

    try:
        if name is not None:
            typer.echo(preset_report.as_json(name, context) if as_json else preset_report.detail(name, context))
            return
        names = [known for known in presets.names() if only in known]
        if not names:
            raise ValueError(f"no preset's name contains {only!r}; known: {', '.join(presets.names())}")
        lines = preset_report.json_lines(names, context) if as_json else preset_report.table_lines(names, context)
        for line in lines:
            typer.echo(line)
    except ValueError as error:
        fail(str(error), exit_code=2)


@app.command()
def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(help="Files, folders, globs, or OWNER/NAME of a dataset on the Hugging Face Hub."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the token files; the same command goes on.")],
    valid: Annotated[list[str] | None, typer.Option(help="A source of validation text. Repeatable.")] = None,
    test: Annotated[list[str] | None, typer.Option(help="A source of test text. Repeatable.")] = None,
    valid_fraction: Annotated[
        float, typer.Option(help="Share of SOURCES' documents to use for validation instead, chosen by their hash.")
    ] = 0.0,
    tokenizer: Annotated[
        str,
        typer.Option(
            help="bytes; train-bpe, on SOURCES; or a folder, a tokenizer.json or a name of the Hugging Face Hub."
        ),
    ] = "bytes",
    vocab_size: Annotated[int, typer.Option(help="Token ids of train-bpe.")] = 32000,
    bpe_fraction: Annotated[float, typer.Option(help="Share of SOURCES' documents to use for train-bpe.")] = 1.0,
    bos: Annotated[bool, typer.Option(help="Begin documents with the tokenizer's bos; all end with its eos.")] = False,
    field: Annotated[str, typer.Option(help="Field of JSON lines, or column of tables, that holds the text.")] = "text",
    glob: Annotated[str, typer.Option(help="Which files of a folder, e.g. '**/*.md'.")] = "**/*",
    separator: Annotated[
        str | None,
        typer.Option(help=r"What ends a document in text files, e.g. '<|endoftext|>' or '\n'; default: a file is one."),
    ] = None,
    hub_config: Annotated[str | None, typer.Option(help="Configuration of a dataset of the Hub.")] = None,
    hub_split: Annotated[str, typer.Option(help="Split of a dataset of the Hub.")] = "train",
    processes: Annotated[int | None, typer.Option(help="How many work at once; default one a core.", min=1)] = None,
    on_error: Annotated[str, typer.Option(help="Text that cannot be read: fail at the first, or skip all.")] = "fail",
    overwrite: Annotated[bool, typer.Option(help="Delete the token files in the folder and start anew.")] = False,
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
    from m2rnn.data.prepare import Settings, table
    from m2rnn.data.prepare import prepare as prepare_text
    from m2rnn.data.sources import DataError, Reading
    from m2rnn.training.display import Display

    try:
        reading = Reading(
            field=field,
            glob=glob,
            separator=None if separator is None else separator.replace("\\n", "\n"),
            hub_config=hub_config,
            hub_split=hub_split,
        )
        settings = Settings(
            sources={"train": sources, "valid": valid or [], "test": test or []},
            reading=reading,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            bpe_fraction=bpe_fraction,
            valid_fraction=valid_fraction,
            bos=bos,
        )
        with Display(sys.stdout) as display:
            manifest = prepare_text(
                settings,
                out,
                processes=processes,
                on_error=on_error,  # type: ignore[arg-type] # checked by prepare
                overwrite=overwrite,
                say=display.say,
                update=display.update,
            )
    except (DataError, RunFolderError) as error:
        fail(str(error), exit_code=2)
    except OSError as error:
        fail(f"{error}. Once that is mended, the same command goes on in {out}", exit_code=1)
    except KeyboardInterrupt:
        fail(f"interrupted; the same command goes on in {out}", exit_code=130)
    typer.echo(table(manifest))
    typer.echo(f"\ntoken files, tokenizer and manifest: {out}")


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
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda if there is one.")] = None,
) -> None:
    """Time and memory of the recurrence: forward, forward and backward, one decode step.

    Each backend beside PyTorch's causal attention and fla's Gated DeltaNet, with the least time that the device's
    peak rates allow. Without a GPU the shapes are small ones. Writes op.csv, op.json and op-time.png into the
    folder. Interrupted, the same command goes on; results of other hardware or versions are measured anew.

    Example: m2rnn bench op --out runs/bench-op
    """
    from m2rnn.evaluation.bench_op import BenchError, bench_op
    from m2rnn.evaluation.bench_report import table
    from m2rnn.evaluation.machine import default_device
    from m2rnn.training.display import Display

    try:
        with Display(sys.stdout) as display:
            rows = bench_op(
                out,
                device=device or default_device(),
                shapes=shapes,
                backends=backends,
                quick=quick,
                sweep=sweep,
                display=display,
            )
    except (SettingsError, RunFolderError) as error:
        fail(str(error), exit_code=2)
    except (BenchError, OSError) as error:
        fail(str(error), exit_code=1)
    except KeyboardInterrupt:
        fail(f"interrupted; the same command goes on in {out}", exit_code=130)
    typer.echo(table(rows))
    typer.echo(f"\nresults{' and plot' if sweep else ''}: {out}")


@app.command("convert")
def convert_checkpoint(
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
    import json

    from m2rnn.convert import ConversionError, convert
    from m2rnn.training.display import Display

    try:
        with Display(None if as_json else sys.stdout) as display:
            done = convert(
                source,
                destination,
                to,
                mlp_layout=mlp_layout,
                force=force,
                max_shard_size=max_shard_size,
                display=display,
            )
    except ConversionError as error:
        fail(str(error), exit_code=2)
    except OSError as error:
        fail(str(error), exit_code=1)
    except KeyboardInterrupt:
        fail(f"interrupted; nothing was written to {destination}", exit_code=130)
    typer.echo(json.dumps(done.as_json(), indent=2) if as_json else done.table())


@app.command("eval")
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
        int | None, typer.Option(help="Tokens of a training sequence: measure the loss by position beyond them too.")
    ] = None,
    beyond: Annotated[int, typer.Option(help="Up to how many times the training length.")] = 8,
    split: Annotated[
        str | None, typer.Option(help="Of prepared text: train, valid or test; default valid if there is one.")
    ] = None,
    documents: Annotated[int | None, typer.Option(help="Only the first so many documents.")] = None,
    join: Annotated[bool, typer.Option(help="Take all documents as one, for long contexts.")] = False,
    field: Annotated[str, typer.Option(help="Field of JSON lines, or column of tables, that holds the text.")] = "text",
    glob: Annotated[str, typer.Option(help="Which files of a folder, e.g. '**/*.md'.")] = "**/*",
    separator: Annotated[
        str | None, typer.Option(help="What ends a document in text files; default: a file is one.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda if there is one.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: float32, bfloat16, float16, float64, or auto: as in the checkpoint.")
    ] = "auto",
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
    byte compares models of different tokenizers. With --train-length, also the loss by position beyond it. Writes
    results.json, plots and every token's loss into the folder. Interrupted, the same command goes on.

    Examples:

    m2rnn eval runs/a/model runs/b/model --data test.jsonl --context 512,2048,8192 --out runs/eval

    m2rnn eval runs/a/model --data data/corpus --train-length 2048 --beyond 8 --join

    m2rnn eval runs/a/model --tasks lambada_openai,hellaswag --batch 16
    """
    import json

    from m2rnn.evaluation.machine import default_device
    from m2rnn.evaluation.perplexity import PerplexitySettings, evaluate_perplexity
    from m2rnn.evaluation.perplexity_report import table
    from m2rnn.training.display import Display

    with user_errors(f"interrupted; the same command goes on in {out}"):
        if (data is None) == (tasks is None):
            raise ValueError("expected one of --data, a text, and --tasks, benchmarks")
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
        settings = PerplexitySettings(
            contexts=contexts or (1024,),
            windows=windows,  # type: ignore[arg-type] # checked by PerplexitySettings
            stride=stride,
            train_length=train_length,
            beyond=beyond,
            split=split,
            documents=documents,
            joined=join,
            reading=reading_of(field, glob, separator),
            dtype=dtype,
            device=device or default_device(),
            batch=batch,
            segment=segment or None,
        )
        with Display(sys.stderr) as display:
            results = evaluate_perplexity(models, data, settings, out, overwrite=overwrite, display=display)
        typer.echo(json.dumps(results, indent=2) if as_json else table(results))
        typer.echo(f"\nresults, plots and the loss of each token: {out}", err=as_json)


@app.command("generate")
def generate_text(
    model: Annotated[Path, typer.Argument(help="Folder of a Hugging Face causal language model and its tokenizer.")],
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; without it, --file or standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="File whose text to continue.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Continue many: a prompt a line, or the field prompt of a .jsonl file.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON lines to write the completions of --prompts to.")] = None,
    batch: Annotated[int, typer.Option(help="Prompts of --prompts to continue at a time.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to make.")] = 128,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 for the most probable token always.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from the so many most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the fewest tokens with this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Leave out tokens below this share of the most probable.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1, makes tokens rarer that were there.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    ignore_eos: Annotated[bool, typer.Option(help="Go on after the end of the text.")] = False,
    static: Annotated[
        bool | None, typer.Option(help="State kept in place, decoding in a CUDA graph; default for M2RNN on a GPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda if there is one.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: float32, bfloat16, float16, float64, or auto: as in the checkpoint.")
    ] = "auto",
) -> None:
    """Continue a text. The completion alone goes to standard output; speed and memory to standard error.

    Recurrent models need the same memory for any length; the last line says how much.

    Examples:

    m2rnn generate runs/a/model "The matrix" --max-new-tokens 200 --temperature 0.8

    m2rnn generate runs/a/model --prompts prompts.jsonl --out completions.jsonl --temperature 0
    """
    from m2rnn.evaluation import generation
    from m2rnn.evaluation.language_model import load_model, load_model_tokenizer
    from m2rnn.evaluation.machine import default_device
    from m2rnn.training.display import Display

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    with user_errors("interrupted"):
        if sum(given is not None for given in (prompt, file, prompts)) > 1:
            raise ValueError("give one of a prompt, --file and --prompts")
        if (prompts is None) != (out is None):
            raise ValueError("--prompts and --out belong together")
        settings = generation.GenerationSettings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            ignore_eos=ignore_eos,
            static=static,
        )
        many = None if prompts is None else generation.read_prompts(prompts)
        loaded = load_model(model, device or default_device(), dtype)
        tokenizer = load_model_tokenizer(model)
        if tokenizer is None:
            raise ValueError(f"{model} has no tokenizer: save it there (save_pretrained)")
        if many is None or out is None:
            text = prompt if prompt is not None else sys.stdin.read() if file is None else file.read_text("utf-8")
            done, speed = generation.complete(loaded, tokenizer, text, settings, write)
            if sys.stdout.isatty():
                write("\n")
            tokens = done.prompt_tokens + done.new_tokens
        else:
            with Display(sys.stderr) as display:
                speed = generation.complete_all(loaded, tokenizer, many, settings, batch, out, display.update)
            tokens = speed.tokens // len(many)
        typer.echo(f"{speed.line()}\n{generation.memory_line(loaded, tokens)}", err=True)


@contextmanager
def user_errors(interrupted: str) -> Iterator[None]:
    """End with one line and without a traceback for what a user or the machine got wrong."""
    try:
        yield
    except (ValueError, RunFolderError) as error:
        fail(str(error), exit_code=2)
    except OSError as error:
        fail(str(error), exit_code=1)
    except KeyboardInterrupt:
        fail(interrupted, exit_code=130)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        reason = str(error).partition(". ")[0]
        fail(f"{reason}: the same command goes on with a smaller --batch or --segment", exit_code=1)


def reading_of(field: str, glob: str, separator: str | None) -> "Reading":
    from m2rnn.data.sources import Reading

    return Reading(field=field, glob=glob, separator=None if separator is None else separator.replace("\\n", "\n"))


def parse_contexts(text: str) -> tuple[int | None, ...]:
    try:
        return tuple(None if part.strip() == "full" else int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"context {text!r}: expected whole numbers such as 1024,4096, or full") from None


def parse_numbers(name: str, text: str, example: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(f"{name} {text!r}: expected whole numbers such as {example}") from None


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """``["hidden_size=32"]`` as ``{"hidden_size": 32}``; values are YAML."""
    import yaml

    overrides = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            overrides[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise SettingsError(f"model {pair!r}: expected NAME=VALUE, such as hidden_size=32")
    return overrides


def fail(message: str, exit_code: int) -> NoReturn:
    typer.echo(f"m2rnn: {message}", err=True)
    raise typer.Exit(exit_code)


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
