"""``m2rnn convert``: a checkpoint of lm-engine as one of this library, and back, tensor by tensor."""

import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from m2rnn.convert.checkpoint import CONFIG, DTYPES, Checkpoint, write_config, write_tensors
from m2rnn.convert.lm_engine import MODEL_TYPE, OUR_FIELDS, ConversionError, config_to_ours, config_to_theirs
from m2rnn.convert.lm_engine_tensors import LAYOUTS, Layout, TensorRule, layouts, tensor_rules
from m2rnn.models import M2RNNConfig, M2RNNForCausalLM
from m2rnn.models.shim import AUTO_MAP
from m2rnn.runs.display import Display
from m2rnn.runs.folder import PARTIAL, whole_folder

FORMATS = ("m2rnn", "lm-engine")
#: Where each format's config.json keeps the other's, so that the way back gives the same file.
ORIGINAL = {"m2rnn": "lm_engine", "lm-engine": "m2rnn"}


@dataclass(frozen=True)
class Conversion:
    """What ``convert`` did.

    Attributes:
        source, destination: the folders.
        to: the format of ``destination``, "m2rnn" or "lm-engine".
        layers: how many layers there are of each mixer.
        parameters: numbers in all tensors.
        dtypes: tensors of each dtype.
        mlp_layout: how lm-engine's side stores gate and up, for each kind of layer.
        bytes, files: of the weights written.
        copied: other files that were copied.
        notes: what the format cannot say, a sentence each.
    """

    source: str
    destination: str
    to: str
    layers: dict[str, int]
    parameters: int
    dtypes: dict[str, int]
    mlp_layout: str
    bytes: int
    files: int
    copied: list[str]
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        rows = {
            "to": self.to,
            "layers": ", ".join(f"{count} {name}" for name, count in self.layers.items()),
            "parameters": f"{self.parameters:,}",
            "dtypes": ", ".join(f"{name} in {count} tensors" for name, count in self.dtypes.items()),
            "gate and up": self.mlp_layout,
            "weights": f"{self.bytes / 2**30:.2f} GiB in {self.files} file{'s' * (self.files > 1)}",
            "copied": ", ".join(self.copied) or "nothing else",
            "written to": self.destination,
        }
        lines = [*rows.items(), *(("note", note) for note in self.notes)]
        return "\n".join(f"{name:<12}{text}" for name, text in lines)


def convert(
    source: Path | str,
    destination: Path | str,
    to: str | None = None,
    *,
    mlp_layout: str = "auto",
    force: bool = False,
    max_shard_size: int | str = "2GB",
    display: Display | None = None,
) -> Conversion:
    """Write lm-engine's checkpoint in ``source`` as one of this library to ``destination``, or the other way round.

    Every number is copied as it is, in its dtype; only rows change places. The way back restores every tensor and
    config.json to the bit: each side's config.json keeps the other's, which counts as long as it describes the model.
    ``destination`` appears when it is complete; at most ``max_shard_size`` of weights is in memory.

    Args:
        source: folder with config.json and model.safetensors, or shards with their index.
        destination: a folder that does not exist or is empty.
        to: "m2rnn" or "lm-engine"; by default the format that ``source`` does not have.
        mlp_layout: how lm-engine's side stores gate and up: "interleaved" rows, gate first, or "halves", up first;
            "auto" believes its config.json, and writes interleaved rows.
        force: replace ``destination`` if it holds a model.
        max_shard_size: of one weights file, such as "2GB"; one tensor may be larger.
        display: shows progress.

    Raises:
        ConversionError: for what cannot be converted: a mixer, a field, a missing, unknown or misshapen tensor, by
            name; a destination that holds something.
    """
    source, destination = Path(source), Path(destination)
    display = display or Display()
    if mlp_layout not in LAYOUTS:
        raise ConversionError(f"mlp_layout must be one of {', '.join(LAYOUTS)}, got {mlp_layout!r}")
    _check_destination(source, destination, force)
    display.say(f"reading {source}")
    checkpoint = Checkpoint(source)
    to = _direction(checkpoint.config, to)
    if to == "m2rnn":
        written, config, stored = _to_ours(checkpoint, mlp_layout)
    else:
        written, config, stored = _to_theirs(checkpoint, mlp_layout)
    shapes = _shapes_of(config)
    rules = tensor_rules(config, stored)
    _check_tensors(checkpoint, rules, shapes, config, to)

    by_name = {rule.ours if to == "m2rnn" else rule.theirs: rule for rule in rules}
    sources = {name: rule.theirs if to == "m2rnn" else rule.ours for name, rule in by_name.items()}
    sizes = {name: checkpoint.bytes_of(old) for name, old in sources.items()}
    total = sum(sizes.values())

    def read(name: str) -> torch.Tensor:
        tensor, rule = checkpoint.read(sources[name]), by_name[name]
        return rule.to_ours(tensor) if to == "m2rnn" else rule.to_theirs(tensor)

    def progress(done: int, name: str) -> None:
        display.update(f"{done / 2**30:.2f} of {total / 2**30:.2f} GiB: {name}")

    copied = checkpoint.beside()
    place = destination.resolve()  # of a link, what it names
    try:
        with whole_folder(place.with_name(place.name + ".new")) as partial:
            write_config(partial, written)
            files = write_tensors(partial, sizes, read, max_shard_size, progress)
            for path in copied:
                shutil.copyfile(path, partial / path.name)
    except BaseException:
        shutil.rmtree(place.with_name(place.name + ".new" + PARTIAL), ignore_errors=True)
        raise
    _put_in_place(place)
    return Conversion(
        source=str(source),
        destination=str(destination),
        to=to,
        layers=dict(Counter(config.mixers)),
        parameters=sum(prod(checkpoint.shapes[old]) for old in sources.values()),
        dtypes=dict(Counter(str(DTYPES[checkpoint.dtypes[old]])[6:] for old in sources.values())),
        mlp_layout=_describe(stored, config),
        bytes=total,
        files=len(files),
        copied=[path.name for path in copied],
        notes=_bound_is_lost(config) if to == "lm-engine" else [],
    )


def _bound_is_lost(config: M2RNNConfig) -> list[str]:
    bound = config.mixer_options.get("m2rnn", {}).get("state_weight_bound")
    if "m2rnn" not in config.mixers or bound is None:
        return []
    return [
        f"lm-engine has no state_weight_bound ({bound:g}): W keeps its bits, but training there can leave the bound; "
        "the way back restores the option"
    ]


def _check_destination(source: Path, destination: Path, force: bool) -> None:
    if destination.resolve() == source.resolve():
        raise ConversionError(f"{destination} is the source: choose another folder")
    if destination.resolve() in source.resolve().parents or source.resolve() in destination.resolve().parents:
        raise ConversionError(f"{source} and {destination} lie in one another: choose another folder")
    if Path.cwd().is_relative_to(destination.resolve()):
        raise ConversionError(f"{destination} holds the current folder, which is not replaced: choose another")
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not force:
        raise ConversionError(f"{destination} exists: choose another folder, or --force to replace it")
    if not (destination / CONFIG).is_file():
        raise ConversionError(f"{destination} holds no model (no {CONFIG}), so it is not replaced: choose another")


def _put_in_place(destination: Path) -> None:
    new, old = (destination.with_name(destination.name + suffix) for suffix in (".new", ".old"))
    shutil.rmtree(old, ignore_errors=True)
    if destination.exists():
        destination.replace(old)
    new.replace(destination)
    shutil.rmtree(old, ignore_errors=True)


def _direction(config: dict[str, Any], to: str | None) -> str:
    kind = config.get("model_type")
    found = {MODEL_TYPE: "m2rnn", M2RNNConfig.model_type: "lm-engine"}.get(str(kind))
    if found is None:
        raise ConversionError(
            f"config.json has model_type {kind!r}: expected {MODEL_TYPE!r} (lm-engine) or {M2RNNConfig.model_type!r}"
        )
    if to not in (None, *FORMATS):
        raise ConversionError(f"to must be {' or '.join(FORMATS)}, got {to!r}")
    if to not in (None, found):
        raise ConversionError(f"the source is of format {to} already (model_type {kind!r})")
    return found


def _our_config(config: dict[str, Any]) -> M2RNNConfig:
    try:
        return M2RNNConfig.from_dict(dict(config))
    except (ValueError, StrictDataclassError) as error:
        raise ConversionError(f"config.json: {error}") from error


def _shapes_of(config: M2RNNConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the model's tensors; its layers refuse options that do not fit together."""
    try:
        with torch.device("meta"):
            return {name: tuple(x.shape) for name, x in M2RNNForCausalLM(config).state_dict().items()}
    except ValueError as error:
        raise ConversionError(f"config.json: {error}") from error


def _says_what_it_is(config: M2RNNConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in OUR_FIELDS if hasattr(config, name)}


def _to_ours(checkpoint: Checkpoint, mlp_layout: str) -> tuple[dict[str, Any], M2RNNConfig, list[Layout]]:
    """The config.json to write, what it says, and how the source stores gate and up."""
    theirs = {name: value for name, value in checkpoint.config.items() if name != ORIGINAL["lm-engine"]}
    config = _our_config(config_to_ours(theirs))
    stored = layouts(theirs, mlp_layout)
    original = checkpoint.config.get(ORIGINAL["lm-engine"])
    if isinstance(original, dict):
        expected = config_to_theirs(_our_config(original))
        if all(name in theirs and theirs[name] == value for name, value in expected.items()):
            return original, _our_config(original), stored
    dtype = theirs.get("dtype") or theirs.get("torch_dtype") or _dtype(checkpoint, "transformer.wte.weight")
    written = _says_what_it_is(config) | {
        "model_type": M2RNNConfig.model_type,
        "architectures": [M2RNNForCausalLM.__name__],
        "auto_map": AUTO_MAP,
        "dtype": dtype,
        ORIGINAL["m2rnn"]: {"config": theirs, "mlp_layout": mlp_layout},
    }
    return written, config, stored


def _to_theirs(checkpoint: Checkpoint, mlp_layout: str) -> tuple[dict[str, Any], M2RNNConfig, list[Layout]]:
    """As ``_to_ours``, with how the destination is to store gate and up."""
    ours = {name: value for name, value in checkpoint.config.items() if name != ORIGINAL["m2rnn"]}
    config = _our_config(ours)
    record = checkpoint.config.get(ORIGINAL["m2rnn"])
    if isinstance(record, dict) and mlp_layout in ("auto", record.get("mlp_layout")):
        original = record["config"]
        if _says_what_it_is(_our_config(config_to_ours(original))) == _says_what_it_is(config):
            return original, config, layouts(original, record["mlp_layout"])
    written = config_to_theirs(config, older=mlp_layout == "halves")
    written["dtype"] = ours.get("dtype") or _dtype(checkpoint, "model.embed_tokens.weight")
    return written | {ORIGINAL["lm-engine"]: ours}, config, layouts(written)


def _dtype(checkpoint: Checkpoint, name: str) -> str:
    return str(DTYPES[checkpoint.dtypes.get(name, "F32")])[6:]


def _check_tensors(
    checkpoint: Checkpoint, rules: list[TensorRule], shapes: dict[str, tuple[int, ...]], config: M2RNNConfig, to: str
) -> None:
    """The source has exactly the model's tensors, in the model's shapes."""
    expected = {rule.theirs if to == "m2rnn" else rule.ours: shapes[rule.ours] for rule in rules}
    assert {rule.ours for rule in rules} == shapes.keys() - ({"lm_head.weight"} if config.tie_word_embeddings else ())
    missing = [name for name in expected if name not in checkpoint.shapes]
    unknown = [name for name in checkpoint.shapes if name not in expected]
    problems = [f"{name} is missing" for name in missing]
    for name in unknown:
        tied = name == "lm_head.weight"
        hint = ": tie_word_embeddings is true or absent in config.json, so there should be no separate head"
        problems.append(f"{name} {list(checkpoint.shapes[name])} is unknown" + (hint if tied else ""))
    for name, shape in expected.items():
        found = checkpoint.shapes.get(name, shape)
        if found != shape:
            problems.append(f"{name} has shape {list(found)}, config.json makes it {list(shape)}")
    if problems:
        shown = "\n  ".join(problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else []))
        raise ConversionError(f"the tensors in {checkpoint.folder} do not fit its config.json:\n  {shown}")


def _describe(stored: list[Layout], config: M2RNNConfig) -> str:
    """For the table: "interleaved", or what differs from layer to layer."""
    words = {True: "interleaved", False: "halves, up first"}
    texts = []
    for layout, mlp in zip(stored, config.mlps, strict=True):
        texts.append(words[layout.mlp] + (f" (shared experts {words[layout.shared]})" if mlp == "moe" else ""))
    runs = [(text, len(list(group))) for text, group in groupby(texts)]
    return runs[0][0] if len(runs) == 1 else ", ".join(f"{count} × {text}" for text, count in runs)
