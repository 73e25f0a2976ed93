"""``m2rnn generate``: continue texts."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from m2rnn.cli.errors import out_of_memory, user_errors
from m2rnn.cli.options import Device, Dtype


def generate(
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
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Continue a text. The completion alone goes to standard output; speed and memory to standard error.

    Recurrent models need the same memory for any length; the last line says how much.

    Examples:

    m2rnn generate runs/a/model "The matrix" --max-new-tokens 200 --temperature 0.8

    m2rnn generate runs/a/model --prompts prompts.jsonl --out completions.jsonl --temperature 0
    """
    from m2rnn.evaluation import generation
    from m2rnn.evaluation.language_model import load_model, load_model_tokenizer
    from m2rnn.runs.display import Display
    from m2rnn.runs.machine import default_device

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    with user_errors(ValueError, interrupted="interrupted"), out_of_memory("expected a smaller --batch, or less text"):
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
            if prompt is None:
                prompt = generation.read_text(file)
            done, speed = generation.complete(loaded, tokenizer, prompt, settings, write)
            if sys.stdout.isatty():
                write("\n")
            tokens = done.prompt_tokens + done.new_tokens
        else:
            with Display(sys.stderr) as display:
                tokens, speed = generation.complete_all(loaded, tokenizer, many, settings, batch, out, display.update)
        typer.echo(f"{speed.line()}\n{generation.memory_line(loaded, tokens)}", err=True)
