"""``m2rnn generate``: continue texts."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from m2rnn.cli.errors import out_of_memory, user_errors
from m2rnn.cli.options import Device, Dtype
from m2rnn.runs.folder import SETTINGS, read_json
from m2rnn.runs.models import check_model_folders

Model = Annotated[Path, typer.Argument(help="Folder of a Hugging Face causal language model and its tokenizer.")]
Prompt = Annotated[str | None, typer.Argument(help="Text to continue; without it, --file or standard input.")]
PromptFile = Annotated[Path | None, typer.Option(help="File whose text to continue.")]
Prompts = Annotated[
    Path | None, typer.Option(help="Continue many: a prompt a line, or the field prompt of a .jsonl file.")
]
Completions = Annotated[Path | None, typer.Option(help="JSON lines to write the completions of --prompts to.")]
Batch = Annotated[int, typer.Option(help="Prompts of --prompts to continue at a time.")]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens to make.")]
Temperature = Annotated[float, typer.Option(help="Divides the logits; 0 for the most probable token always.")]
TopK = Annotated[int | None, typer.Option(help="Sample from the so many most probable tokens.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the fewest tokens with this probability.")]
MinP = Annotated[float | None, typer.Option(help="Leave out tokens below this share of the most probable.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1, makes tokens rarer that were there.")]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]
IgnoreEos = Annotated[bool, typer.Option(help="Go on after the end of the text.")]
Static = Annotated[
    bool | None, typer.Option(help="State kept in place, decoding in a CUDA graph; default for M2RNN on a GPU.")
]


def generate(
    model: Model,
    prompt: Prompt = None,
    file: PromptFile = None,
    prompts: Prompts = None,
    out: Completions = None,
    batch: Batch = 8,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = 0,
    ignore_eos: IgnoreEos = False,
    static: Static = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Continue a text. The completion alone goes to standard output; speed and memory to standard error.

    Recurrent models need the same memory for any length; the last line says how much.

    Examples:

    m2rnn generate runs/a/model "The matrix" --max-new-tokens 200 --temperature 0.8

    m2rnn generate runs/a/model --prompts prompts.jsonl --out completions.jsonl --temperature 0
    """
    with user_errors(ValueError, interrupted="interrupted"), out_of_memory("expected a smaller --batch, or less text"):
        if sum(given is not None for given in (prompt, file, prompts)) > 1:
            raise ValueError("give one of a prompt, --file and --prompts")
        if (prompts is None) != (out is None):
            raise ValueError("--prompts and --out belong together")
        choices = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "ignore_eos": ignore_eos,
            "static": static,
        }
        check_model_folders([model])
        many = None if prompts is None or out is None else (prompts, out, batch)
        _generate(model, prompt, file, many, choices, device, dtype)


def _generate(
    folder: Path,
    prompt: str | None,
    file: Path | None,
    many: tuple[Path, Path, int] | None,
    choices: dict[str, Any],
    device: str | None,
    dtype: str,
) -> None:
    """Continue one text, or ``many``: the prompts, where their completions go, and how many at a time."""
    from m2rnn.evaluation import generation
    from m2rnn.evaluation.language_model import load_model, load_model_tokenizer
    from m2rnn.runs.display import Display
    from m2rnn.runs.machine import default_device

    settings = generation.GenerationSettings(**choices)
    texts = None if many is None else generation.read_prompts(many[0])
    loaded = load_model(folder, device or default_device(), dtype)
    tokenizer = load_model_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer: {_without_tokenizer(folder)}")
    if many is None or texts is None:
        if prompt is None:
            prompt = generation.read_text(file)
        done, speed = generation.complete(loaded, tokenizer, prompt, settings, _write)
        if sys.stdout.isatty():
            _write("\n")
        tokens = done.prompt_tokens + done.new_tokens
    else:
        _, out, batch = many
        with Display(sys.stderr) as display:
            tokens, speed = generation.complete_all(loaded, tokenizer, texts, settings, batch, out, display.update)
    typer.echo(f"{speed.line()}\n{generation.memory_line(loaded, tokens)}", err=True)


def _without_tokenizer(folder: Path) -> str:
    """What to do with a model that has none, such as one of ``m2rnn track`` or ``m2rnn tasks``."""
    file = folder.resolve().parent / SETTINGS
    settings = read_json(file) if file.is_file() else {}
    group, task = settings.get("group"), settings.get("task")
    if task is not None:
        return (
            f"m2rnn tasks trained it on the tokens of {task}, which are numbers, not text. It reads them and gives its "
            "answers at their places: M2RNNForCausalLM.from_pretrained(…)(numbers).logits.argmax(-1)"
        )
    if group is None:
        return "save it there (save_pretrained)"
    return (
        f"m2rnn track trained it on elements of the group {group}, which are numbers, not text. It reads them and says "
        "their products: M2RNNForCausalLM.from_pretrained(…)(numbers).logits.argmax(-1)"
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
