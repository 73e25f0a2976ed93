"""What ``m2rnn presets`` prints: all presets as a table, or one in detail."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from m2rnn.models import M2RNNConfig, presets
from m2rnn.models.sizes import ModelSize, size_of

COLUMNS = (
    ("preset", 39),
    ("parameters", -13),
    ("active", -13),
    ("non-embedding", -13),
    ("recurrent state a layer", -23),
    ("KV a token", -10),
    ("FLOP a token", -12),
)


def table_lines(names: Sequence[str], context: int) -> Iterator[str]:
    """The table, line by line as the presets are measured."""
    yield _row(*(title for title, _ in COLUMNS))
    letters: dict[str, str] = {}
    for name in names:
        config = presets.get(name)
        size = size_of(config, context)
        letters |= dict(zip(presets.pattern_of(config), config.mixers, strict=True))
        yield _row(
            name,
            f"{size.parameters:,}",
            f"{size.active:,}",
            f"{size.non_embedding:,}",
            _states(size.state_per_layer) or "-",
            f"{size.kv_cache:,}",
            _operations(size.training_flops),
        )
    yield ""
    yield ", ".join(f"{letter} {mixer}" for letter, mixer in letters.items())
    yield f"work of a forward and a backward pass over sequences of {context:,} tokens; state and cache are numbers"


def json_lines(names: Sequence[str], context: int) -> Iterator[str]:
    """A JSON array with an object a line, as the presets are measured."""
    for place, name in enumerate(names):
        start, end = "[" if place == 0 else " ", "]" if place == len(names) - 1 else ","
        yield start + json.dumps(_record(name, presets.get(name), context)) + end


def as_json(name: str, context: int) -> str:
    """One preset as a JSON object, with its configuration."""
    config = presets.get(name)
    return json.dumps({**_record(name, config, context), "config": config.to_diff_dict()}, indent=2)


def detail(name: str, context: int) -> str:
    """One preset: its pattern, the options of its layers, its sizes."""
    config = presets.get(name)
    size = size_of(config, context)
    pattern = presets.pattern_of(config)
    lines = [
        name,
        "",
        _line("layers", f"{config.num_hidden_layers} of width {config.hidden_size:,}"),
        _line("pattern", " ".join(pattern[i : i + 8] for i in range(0, len(pattern), 8))),
    ]
    for letter, mixer in dict(zip(pattern, config.mixers, strict=True)).items():
        lines.append(_line(f"  {letter} {mixer}", _layers(config.mixers, mixer, config.mixer_options, size)))
    lines += [
        *(_line(f"  {mlp}", _layers(config.mlps, mlp, config.mlp_options, size)) for mlp in dict.fromkeys(config.mlps)),
        _line("vocabulary", f"{config.vocab_size:,}{', one matrix for both' if config.tie_word_embeddings else ''}"),
        "",
        _line("parameters", f"{size.parameters:,}"),
        _line("  active", f"{size.active:,}"),
        _line("  non-embedding", f"{size.non_embedding:,}"),
    ]
    for title, per_layer in (("recurrent state", size.state_per_layer), ("conv state", size.conv_per_layer)):
        lines += [_line(title, f"{state:,} numbers a layer of {mixer}") for mixer, state in per_layer.items()]
    lines += [
        _line("all recurrent", f"{size.state:,} numbers a sequence"),
        _line("KV cache", f"{size.kv_cache:,} numbers a token, all layers"),
        _line("training", f"{_operations(size.training_flops)}FLOP a token at a context of {context:,}"),
    ]
    return "\n".join(lines)


def _record(name: str, config: M2RNNConfig, context: int) -> dict[str, Any]:
    return {"name": name, "pattern": presets.pattern_of(config), **size_of(config, context).as_json()}


def _row(*cells: str) -> str:
    columns = zip(cells, COLUMNS, strict=True)
    return "  ".join(f"{cell:<{width}}" if width > 0 else f"{cell:>{-width}}" for cell, (_, width) in columns)


def _line(title: str, text: str) -> str:
    return f"{title:<20}{text}"


def _layers(names: Sequence[str], name: str, options: dict[str, dict[str, Any]], size: ModelSize) -> str:
    """How many layers are of this name, the parameters of one, and its options."""
    given = ", ".join(f"{option} {value}" for option, value in options.get(name, {}).items())
    return f"{names.count(name)} × {size.per_layer.get(name, 0):,} parameters{f' ({given})' if given else ''}"


def _states(state_per_layer: dict[str, int]) -> str:
    """Numbers of a layer, each with its mixer's letter: ``M 135,168 G 393,216``."""
    return " ".join(f"{presets.LETTERS[mixer]} {state:,}" for mixer, state in state_per_layer.items())


def _operations(count: float) -> str:
    """``7438123456`` as ``7.44 G``."""
    for unit in ("", "k", "M", "G"):
        if count < 1000 or unit == "G":
            break
        count /= 1000
    return f"{count:.2f} {unit}"
