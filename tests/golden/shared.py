"""What make.py records and test_golden.py checks, each by the same code: outputs, public names, commands, machine.

It imports only what must not move: what docs/ names, and the command line's entry point.
"""

import ast
import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from typer.main import get_command
from typer.testing import CliRunner

from m2rnn.data.token_files import TokenDataset

DATA = Path(__file__).parent / "data"
NEW_TOKENS = 8

# Commands run in DATA, as their paths show; {out} is a folder elsewhere.
PREPARE = {
    "bytes": "prepare text.jsonl --valid-fraction 0.25 --processes 1 --out {out}",
    "bpe": "prepare text.jsonl --valid-fraction 0.25 --processes 1 --tokenizer train-bpe --vocab-size 290 --out {out}",
}
RUNS = {
    "train": "train train/recipe.yaml --data tokens/bytes --out {out}",
    "track": "track --group S3 --mixer m2rnn --train-length 8 --steps 10 --batch-size 4 --noise 0.2 "
    "--checkpoint-every 4 --decay-steps 3 --test-lengths 8,16 --test-sequences 8 --device cpu "
    '--model hidden_size=16 --model mixer_options={"m2rnn":{"value_dim":4}} --out {out}',
}


def run_command(command: str, out: Path) -> str:
    """What an ``m2rnn`` command prints; it must succeed."""
    from m2rnn.cli import app

    done = CliRunner().invoke(app, [part.replace("{out}", str(out)) for part in command.split()])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, f"m2rnn {command} ended with {done.exit_code}:\n{done.output}"
    return str(done.stdout)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def log_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def machine() -> dict[str, str]:
    """What decides the last bits of a computation on a CPU, besides the library."""
    from llvmlite.binding import get_host_cpu_name

    return {
        **{package: version(package) for package in ("torch", "transformers", "numba", "numpy")},
        "cpu": str(get_host_cpu_name()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


@torch.no_grad()
def outputs_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits and losses in every layout that ``inputs`` gives, and what a prompt is continued with.

    Args:
        inputs: ``ids`` and ``mask`` [B, T], ``prompt`` [B, P]; ``packed`` [1, N] with ``cu_seq_lens_q`` for models that
            pack sequences.
    """
    ids, mask = inputs["ids"], inputs["mask"]
    whole = model(input_ids=ids, labels=ids, use_cache=False)
    padded = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False)
    found = {
        "logits": whole.logits,
        "loss": whole.loss,
        "padded_logits": padded.logits[mask == 1],
        "padded_loss": padded.loss,
    }
    if "packed" in inputs:
        row = inputs["packed"]
        packed = model(input_ids=row, cu_seq_lens_q=inputs["cu_seq_lens_q"], labels=row, use_cache=False)
        found |= {"packed_logits": packed.logits, "packed_loss": packed.loss}
    prompt = inputs["prompt"]
    found["generated"] = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    return {name: tensor.contiguous() for name, tensor in found.items()}


def tokens_of(folder: Path) -> dict[str, Tensor]:
    """The ids and the ends of the documents in each split of a folder of token files, as they are read."""
    found = {}
    for split in ("train", "valid"):
        data = TokenDataset(folder, split)
        documents = [data.document(number).astype("int32") for number in range(data.num_documents)]
        found[f"{split}_ids"] = torch.cat([torch.from_numpy(document) for document in documents])
        found[f"{split}_ends"] = torch.tensor([len(document) for document in documents]).cumsum(0).int()
    return found


def resolve(name: str) -> Any:
    """The module, or the attribute of one, that a dotted name means.

    Raises:
        ImportError, AttributeError: if there is none.
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if length == 1 or error.name is None or not module.startswith(error.name):
                raise
            continue  # the last part is an attribute
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


def signatures_of(found: Any) -> dict[str, str]:
    """The signature of a function, or of a class and its own documented methods; nothing for a module or an error.

    Of a model ``forward`` alone: its other public methods are transformers' hooks.
    """
    if not callable(found) or (inspect.isclass(found) and issubclass(found, Exception)):
        return {}
    described = {"": signature_of(found)}
    if inspect.isclass(found):
        hooks = issubclass(found, (PreTrainedModel, PreTrainedConfig))
        for name in vars(found):
            method = getattr(found, name)
            if name.startswith("_") or (hooks and name != "forward") or not inspect.isroutine(method):
                continue
            if method.__doc__:
                described["." + name] = signature_of(found, name)
    return described


def signature_of(found: Any, method: str = "") -> str:
    """A signature, of a method of ``found`` if one is named, without annotations; ``...`` are defaults not shown.

    Raises:
        AttributeError: if there is no such method.
    """
    described = getattr(found, method) if method else found
    parameters = [
        each.replace(annotation=each.empty, default=each.empty if each.default is each.empty else _Shown(each.default))
        for each in inspect.signature(described).parameters.values()
        if _is_own(found, each.name)
    ]
    return str(inspect.Signature(parameters))


def presets() -> dict[str, dict[str, Any]]:
    """The fields of every preset's configuration that are this library's, not transformers'."""
    from m2rnn import M2RNNConfig
    from m2rnn import presets as module

    own = [field.name for field in fields(M2RNNConfig) if field.name in M2RNNConfig.__annotations__]
    configs = {name: module.get(name) for name in module.names()}
    return {name: {field: getattr(config, field) for field in own} for name, config in configs.items()}


def commands() -> dict[str, dict[str, str]]:
    """For each command of ``m2rnn`` the default of each of its options, by the name that users type."""
    from m2rnn.cli import app

    found: dict[str, dict[str, str]] = {}

    def visit(name: str, command: Any) -> None:
        for inner_name, inner in getattr(command, "commands", {}).items():
            visit(f"{name} {inner_name}".strip(), inner)
        if not hasattr(command, "commands"):
            found[name] = {
                option: "required" if given.required else _literal(given.default)
                for given in command.params
                for option in (*given.opts, *given.secondary_opts)
            }

    visit("", get_command(app))
    return found


def refusals(old_text: str, new_text: str) -> Iterator[str]:
    """Which calls that an old signature takes are not taken alike by a new one: a line for each reason.

    A new signature may have more parameters, if they have defaults and stand after the old positional ones.
    """
    keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    old, now = (inspect.signature(_function(text)).parameters for text in (old_text, new_text))
    positional = [each for each in old.values() if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    for place, parameter in enumerate(positional):
        today = list(now.values())[place] if place < len(now) else None
        if today is None or today.name != parameter.name or today.kind != parameter.kind:
            yield f"argument {place + 1} was {parameter.name}, now {today}"
    for parameter in old.values():
        if parameter.name not in now:
            yield f"{parameter} is gone"
            continue
        today = now[parameter.name]
        if parameter.default is not parameter.empty and today.default != parameter.default:
            yield f"the default of {parameter.name} was {parameter.default!r}, now {_default(today)}"
        if parameter.kind == parameter.KEYWORD_ONLY and today.kind not in keyword:
            yield f"{parameter.name} is no keyword any more"
    for parameter in now.values():
        variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.name not in old and parameter.default is parameter.empty and not variable:
            yield f"{parameter.name} is new and has no default"


def _is_own(found: Any, name: str) -> bool:
    """False for a field of a configuration that comes from transformers, whose versions differ in them."""
    is_config = inspect.isclass(found) and issubclass(found, PreTrainedConfig)
    return not is_config or name in found.__annotations__


class _Shown:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return _literal(self.value)


def _literal(value: Any) -> str:
    try:
        return repr(value) if ast.literal_eval(repr(value)) == value else "..."
    except (ValueError, SyntaxError):
        return "..."


def _function(signature: str) -> Callable[..., None]:
    """A function of this signature."""
    scope: dict[str, Any] = {}
    exec(f"def function{signature}: ...", scope)
    function: Callable[..., None] = scope["function"]
    return function


def _default(parameter: inspect.Parameter) -> str:
    return "there is none" if parameter.default is parameter.empty else repr(parameter.default)
