"""A model's folder on disk: configuration and safetensors, read a tensor and written a file at a time."""

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from m2rnn.convert.lm_engine import ConversionError
from m2rnn.models.shim import write_shim

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BESIDE = (".json", ".txt", ".model", ".jinja")  # what a tokenizer and generate() need


class Checkpoint:
    """The tensors of a folder, by name, in one safetensors file or several with an index.

    Attributes:
        config: config.json.
        shapes: of every tensor, in the files' order.
        dtypes: the same names to safetensors' names of dtypes.

    Raises:
        ConversionError: if a file is missing, damaged, or holds a tensor that another holds too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / CONFIG)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._file_of: dict[str, Path] = {}
        for path in self._files():
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a mapping)
                        if name in self._file_of:
                            raise ConversionError(f"{name} is in {path.name} and in {self._file_of[name].name}")
                        part = file.get_slice(name)
                        self._file_of[name], self.dtypes[name] = path, part.get_dtype()
                        self.shapes[name] = tuple(part.get_shape())
            except (OSError, SafetensorError) as error:
                raise ConversionError(f"{path} cannot be read: {error}") from error
        for name, dtype in self.dtypes.items():
            if dtype not in ITEM_BYTES:
                raise ConversionError(f"{name} holds {dtype} numbers; known are {', '.join(ITEM_BYTES)}")

    def _files(self) -> list[Path]:
        index, single = self.folder / INDEX, self.folder / WEIGHTS
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ConversionError(f"{index} has no weight_map")
            # By their base names: an index must not lead out of its folder.
            return [self.folder / Path(name).name for name in sorted(set(weight_map.values()))]
        if not single.exists():
            pickled = sorted(path.name for path in self.folder.glob("*.bin"))
            hint = f"; {pickled[0]} is a pickle, which is not read: save it as safetensors first" if pickled else ""
            raise ConversionError(f"{self.folder} has neither {WEIGHTS} nor {INDEX}{hint}")
        return [single]

    def bytes_of(self, name: str) -> int:
        return prod(self.shapes[name]) * ITEM_BYTES[self.dtypes[name]]

    def read(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def beside(self) -> list[Path]:
        """The files of a tokenizer and of generate() in the folder."""
        own = (CONFIG, INDEX)
        return sorted(p for p in self.folder.iterdir() if p.is_file() and p.suffix in BESIDE and p.name not in own)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ConversionError, naming the file, if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds {type(content).__name__}, not an object")
    return content


def write_tensors(
    folder: Path,
    sizes: Mapping[str, int],
    read: Callable[[str], Tensor],
    max_shard_size: int | str,
    progress: Callable[[int, str], None],
) -> list[str]:
    """Write the tensors of these names and sizes in bytes, one file in memory at a time; returns the files' names."""
    try:
        plan = split_state_dict_into_shards_factory(
            dict(sizes),
            get_storage_size=lambda size: size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ConversionError(f"max_shard_size {max_shard_size!r}: expected a size such as 500MB or 2GB") from error
    done = 0
    for file, names in plan.filename_to_tensors.items():
        tensors = {}
        for name in names:
            progress(done, name)
            tensors[name] = read(name).contiguous()
            done += sizes[name]
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / INDEX, index)
    return list(plan.filename_to_tensors)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, and the shim if its ``auto_map`` names one."""
    write_json(folder / CONFIG, config)
    write_shim(folder, config.get("auto_map"))
