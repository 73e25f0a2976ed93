"""A checkpoint whose W is cut to a bound: for a model that was trained without one."""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2rnn.convert.checkpoint import CONFIG, Checkpoint, write_config, write_tensors
from m2rnn.convert.lm_engine import MODEL_TYPE, ConversionError
from m2rnn.convert.swapped import RECORD
from m2rnn.layers.state_weight import bound_, head_bounds
from m2rnn.models import M2RNNConfig
from m2rnn.runs.display import Display
from m2rnn.runs.folder import whole_folder


@dataclass(frozen=True)
class Cut:
    """What ``cut_state_weights`` did.

    Attributes:
        source, destination: the folders.
        bound: largest singular value of the bounded heads.
        layers: M2RNN layers that were cut.
        heads: their bounded heads together.
        over: how many of these had a singular value above the bound.
        largest: the largest singular value of the bounded heads before.
        copied: other files that were copied.
    """

    source: str
    destination: str
    bound: float
    layers: int
    heads: int
    over: int
    largest: float
    copied: list[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        rows = {
            "bound": f"{self.bound:g}",
            "heads": f"{self.heads} of W in {self.layers} layer{'s' * (self.layers != 1)}, {self.over} above the bound",
            "largest": f"singular value {self.largest:.3f} before",
            "copied": ", ".join(self.copied) or "nothing else",
            "written to": self.destination,
        }
        return "\n".join(f"{name:<12}{text}" for name, text in rows.items())


def cut_state_weights(
    folder: Path | str,
    out: Path | str,
    bound: float,
    heads: int | None = None,
    *,
    max_shard_size: int | str = "2GB",
    display: Display | None = None,
) -> Cut:
    """Write the model in ``folder`` to ``out`` with the singular values of W cut at ``bound``.

    All other tensors keep their bits, W its dtype. config.json says ``state_weight_bound`` and ``bounded_heads``, so
    that ``bound_state_weights`` and ``m2rnn train`` hold the bound from then on. A model computes something else
    afterwards: measure it. ``out`` appears when it is complete; at most ``max_shard_size`` of weights is in memory.

    Args:
        folder: with config.json and safetensors: a model of this library, or one that ``swap`` has changed.
        out: a folder that does not exist.
        bound: above 0, such as 0.9.
        heads: how many heads of each layer's W, the first ones, it holds for; None for all.
        max_shard_size: of one weights file, such as "2GB"; one tensor may be larger.
        display: shows progress.

    Raises:
        ConversionError: for a folder that is no such model, a bound or heads that cannot be, or an ``out`` that exists.
    """
    folder, out = Path(folder), Path(out)
    display = display or Display()
    if out.exists():
        raise ConversionError(f"{out} exists: choose another folder")
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    options = {"state_weight_bound": bound, "bounded_heads": heads}
    weights = set(_state_weights(checkpoint))
    try:
        limits = {name: head_bounds(checkpoint.shapes[name][0], bound, heads) for name in weights}
    except ValueError as error:
        raise ConversionError(str(error)) from error
    found: list[Tensor] = []

    def read(name: str) -> Tensor:
        tensor = checkpoint.read(name)
        limit = limits.get(name)
        if limit is not None:
            if not tensor.isfinite().all():
                raise ConversionError(f"{name} holds a NaN or an infinity, which cannot be cut")
            found.append(torch.linalg.matrix_norm(tensor.double(), 2)[limit.isfinite()])
            bound_(tensor, bound, heads)
        return tensor

    copied = checkpoint.beside()
    with whole_folder(out) as partial:
        write_config(partial, _with_options(config, options))
        sizes = {name: checkpoint.bytes_of(name) for name in checkpoint.shapes}
        write_tensors(partial, sizes, read, max_shard_size, lambda done, name: display.update(f"cutting: {name}"))
        for path in copied:
            shutil.copyfile(path, partial / path.name)
    values = torch.cat(found)
    return Cut(
        source=str(folder),
        destination=str(out),
        bound=bound,
        layers=len(weights),
        heads=len(values),
        over=int((values > bound).sum()),
        largest=values.max().item() if len(values) else 0.0,
        copied=[path.name for path in copied],
    )


def _state_weights(checkpoint: Checkpoint) -> Iterator[str]:
    """The names of W in M2RNN layers; RNNs and GRUs have a tensor of this name, too."""
    config, kind = checkpoint.config, checkpoint.config.get("model_type")
    if RECORD in config:
        ends = [(f"layers.{layer}.", ".m2rnn.state_weight") for layer in config[RECORD]]
    elif kind == M2RNNConfig.model_type:
        mixers = config.get("mixers", [])
        ends = [(f"layers.{i}.", ".mixer.state_weight") for i, mixer in enumerate(mixers) if mixer == "m2rnn"]
    else:
        hint = ": convert it with m2rnn convert first" if kind == MODEL_TYPE else ""
        raise ConversionError(
            f"{checkpoint.folder / CONFIG} has model_type {kind!r}: expected {M2RNNConfig.model_type!r}, or a model "
            f"with swapped layers ({RECORD!r}){hint}"
        )
    if not ends:
        raise ConversionError(f"{checkpoint.folder} has no M2RNN layer, so there is no W to cut")
    for layer, weight in ends:
        names = [name for name in checkpoint.shapes if f".{layer}" in f".{name}" and name.endswith(weight)]
        if len(names) != 1:
            raise ConversionError(f"{checkpoint.folder}: expected one tensor {layer}*{weight}, found {len(names)}")
        yield from names


def _with_options(config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """config.json with these options of the M2RNN layers, those of a swap where there are such."""
    if RECORD in config:
        return config | {RECORD: {layer: own | options for layer, own in config[RECORD].items()}}
    mixers = config.get("mixer_options") or {}
    return config | {"mixer_options": mixers | {"m2rnn": mixers.get("m2rnn", {}) | options}}
