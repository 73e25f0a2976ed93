"""Checkpoints of a run: safetensors and JSON, nothing pickled, and always one that is whole.

checkpoints/step-00000200/
    model-00000.safetensors, …       weights, by parameter name
    optimizer-00000.safetensors, …   the optimizer's tensors, as "<parameter name>/<tensor name>"
    state.json                       everything else, as the caller gave it
    checkpoint.json                  the size and the SHA-256 of the other files

Several processes save together. A sharded parameter (DTensor) is gathered whole, one at a time, and the first process
writes about ``FILE_BYTES`` at once: no process ever holds the model, and a checkpoint does not depend on how many
processes wrote it or will read it. ``torch.distributed.checkpoint`` would write the shards side by side, but it pickles
its metadata. The price is that one process writes everything. Loading, each process reads each tensor and keeps
its part. All processes must see the folder.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from m2rnn.runs.folder import CHECKPOINTS, PARTIAL, to_json, whole_folder

Value = TypeVar("Value")

FORMAT = "m2rnn checkpoint 1"
MANIFEST, STATE = "checkpoint.json", "state.json"
FILE_BYTES = 2**31


class CheckpointError(Exception):
    """A checkpoint cannot be written or read: the message names the file and says what to do."""


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    *,
    files: Mapping[str, bytes] | None = None,
    keep: int = 1,
) -> None:
    """Save a checkpoint of ``step``, then delete all but the newest ``keep``; every process must call this.

    Args:
        folder: of the run.
        state: for JSON, of the first process.
        files: other files to store, by name.

    Raises:
        CheckpointError: in every process, if the first one cannot write; the older checkpoints stay.
    """
    path = folder / CHECKPOINTS / f"step-{step:08d}"
    failure = None
    if from_first_process(path.exists()):  # saved before: the processes must agree whether to gather
        return
    if is_first_process():
        try:
            for unfinished in path.parent.glob("step-*" + PARTIAL):  # of processes that were killed
                shutil.rmtree(unfinished)
            with whole_folder(path) as partial:
                _write_files(partial, model, optimizer, {STATE: to_json(state), **(files or {})})
            for older in checkpoints(folder)[:-keep]:
                shutil.rmtree(older)
        except (OSError, SafetensorError) as error:
            failure = f"cannot write the checkpoint {path}: {error}. The ones before it are whole: make room, go on"
    else:
        for _ in _whole_tensors(model, optimizer):
            pass
    raise_everywhere(failure)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run, every file of which is as it was written; None if there is none.

    Raises:
        CheckpointError: in every process, naming the file that is missing or differs.
    """
    paths = checkpoints(folder)
    failure = None
    if paths and is_first_process():
        failure = _damage(paths[-1])
        if failure:
            others = f"go on from {paths[-2].name}" if len(paths) > 1 else "start anew"
            failure += f": bring the file back, or delete {paths[-1]} to {others}"
    raise_everywhere(failure)
    return paths[-1] if paths else None


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Load the newest checkpoint into model and optimizer and return its state; None if there is none."""
    path = newest_checkpoint(folder)
    if path is None:
        return None
    load_weights(path, model)
    load_optimizer(path, model, optimizer)
    return load_state(path)


def load_state(path: Path) -> dict[str, Any]:
    """The state that was saved with a checkpoint."""
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    return state


@torch.no_grad()
def load_weights(path: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into a model, sharded or not.

    Raises:
        CheckpointError: if they are another model's.
    """
    own = _weights(model)
    for name, tensor in _read(path, "model"):
        if name not in own or own[name].shape != tensor.shape:
            there = tuple(own[name].shape) if name in own else "nothing"
            raise CheckpointError(f"{path} is another model's: {name} is {tuple(tensor.shape)} there, {there} here")
        weight = own.pop(name)
        weight.copy_(_like(weight, tensor))
    if own:
        raise CheckpointError(f"{path} is another model's: it has no {', '.join(sorted(own)[:3])}")


def load_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint's moments into the optimizer of ``model``; settings such as its learning rate stay."""
    parameters = dict(model.named_parameters())
    moments: dict[nn.Parameter, dict[str, Tensor]] = {}
    for name, tensor in _read(path, "optimizer"):
        parameter_name, _, key = name.rpartition("/")
        if parameter_name not in parameters:
            raise CheckpointError(f"{path} is another model's: its optimizer has {parameter_name!r}")
        parameter = parameters[parameter_name]
        moments.setdefault(parameter, {})[key] = tensor if tensor.dim() == 0 else _like(parameter, tensor)
    groups = optimizer.state_dict()["param_groups"]
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    known = {number: moments[parameter] for number, parameter in enumerate(order) if parameter in moments}
    optimizer.load_state_dict({"state": known, "param_groups": groups})


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints, oldest first."""
    paths = (folder / CHECKPOINTS).glob("step-*")
    return sorted(
        (path for path in paths if re.fullmatch(r"step-\d{8,}", path.name)), key=lambda path: int(path.name[5:])
    )


def whole_tensors(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors by name, gathered from all processes, which must all call this."""
    for name, tensor in tensors.items():
        yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def weights_on_first_process(model: nn.Module) -> dict[str, Tensor]:
    """All weights in the CPU's memory of the first process, nothing in the others, which must all call this."""
    return {name: tensor.cpu() for name, tensor in whole_tensors(_weights(model)) if is_first_process()}


def is_first_process() -> bool:
    return not _distributed() or dist.get_rank() == 0


def from_first_process(value: Value) -> Value:
    """What the first process gives, in all processes."""
    if not _distributed():
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def raise_everywhere(failure: str | None, kind: type[Exception] = CheckpointError) -> None:
    """Raise the first process's failure in all processes."""
    failure = from_first_process(failure)
    if failure:
        raise kind(failure)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each once."""
    saved = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": tensor
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }


def _whole_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, Tensor]]:
    """The kind, the name and the whole of each tensor to save, one after the other."""
    for kind, tensors in (("model", _weights(model)), ("optimizer", _moments(model, optimizer))):
        for name, tensor in whole_tensors(tensors):
            yield kind, name, tensor


def _write_files(partial: Path, model: nn.Module, optimizer: torch.optim.Optimizer, files: Mapping[str, bytes]) -> None:
    tensors = _whole_tensors(model, optimizer)
    try:
        _write_tensors(partial, tensors)
        for name, content in files.items():
            (partial / name).write_bytes(content)
        described = {file.name: _description(file) for file in sorted(partial.iterdir())}
        (partial / MANIFEST).write_bytes(to_json({"format": FORMAT, "files": described}))
    finally:
        for _ in tensors:  # a failure here must not leave the others waiting to gather
            pass


def _write_tensors(partial: Path, tensors: Iterable[tuple[str, str, Tensor]]) -> None:
    pending: dict[str, Tensor] = {}
    pending_kind, number = "model", 0

    def flush() -> None:
        nonlocal number
        if pending:
            save_file(pending, partial / f"{pending_kind}-{number:05d}.safetensors")
            number += 1
            pending.clear()

    for kind, name, tensor in tensors:
        if kind != pending_kind:
            flush()
            pending_kind, number = kind, 0
        # A copy, since the file is written later and tied storage cannot be saved.
        pending[name] = tensor.to("cpu", copy=tensor.device.type == "cpu").contiguous()
        if sum(tensor.nbytes for tensor in pending.values()) >= FILE_BYTES:
            flush()
    flush()


def _description(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _damage(path: Path) -> str | None:
    """Which file of a checkpoint is not as it was written, and how."""
    manifest = path / MANIFEST
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return f"{manifest} has the format {content['format']!r}, not {FORMAT!r}"
        described: dict[str, Any] = content["files"]
        for name in (STATE, "model-00000.safetensors"):
            if name not in described:
                return f"{manifest} is damaged (it lists no {name})"
        for file in path.glob("*.safetensors"):
            if file.name not in described:
                return f"{file} is not one of the files that {MANIFEST} lists"
        for name, expected in described.items():
            file = path / name
            size = file.stat().st_size
            if size != expected["bytes"]:
                return f"{file} has {size:,} bytes, not {expected['bytes']:,}: it was truncated or replaced"
            if _description(file) != expected:
                return f"{file} is damaged or another checkpoint's: its SHA-256 is not the one in {MANIFEST}"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest} is damaged ({error})"
    return None


def _read(path: Path, kind: str) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(path.glob(f"{kind}-*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no mapping)
                yield name, tensors.get_tensor(name)


def _like(weight: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor placed, and sharded, as ``weight`` is."""
    if isinstance(weight, DTensor):
        # Every process has the whole tensor: nothing is sent.
        whole = tensor.to(weight.device)
        return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
    return tensor.to(weight.device)
