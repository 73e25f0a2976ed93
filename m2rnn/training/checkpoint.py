"""Checkpoints of a run: safetensors and JSON, nothing pickled, and always one that is whole.

checkpoints/step-00000200/
    model.safetensors       weights, by parameter name
    optimizer.safetensors   the optimizer's tensors, as "<parameter name>/<tensor name>"
    state.json              everything else, as the caller gave it
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from m2rnn.data.run_folder import CHECKPOINTS, PARTIAL, to_json, whole_folder


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Save a checkpoint of ``step``, then delete the older ones."""
    path = folder / CHECKPOINTS / f"step-{step:08d}"
    if path.exists():
        return
    with whole_folder(path) as partial:
        save_model(model, str(partial / "model.safetensors"))
        save_file(_optimizer_tensors(model, optimizer), partial / "optimizer.safetensors")
        (partial / "state.json").write_bytes(to_json(state))
    for older in _checkpoints(folder)[:-1]:
        shutil.rmtree(older)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Load the newest checkpoint into model and optimizer and return its state; None if there is none."""
    paths = _checkpoints(folder)
    if not paths:
        return None
    load_model(model, paths[-1] / "model.safetensors")
    tensors = load_file(paths[-1] / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        prefix = f"{name}/"
        optimizer.state[parameter] = {
            key.removeprefix(prefix): tensor if key == f"{prefix}step" else tensor.to(parameter.device)
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
    state: dict[str, Any] = json.loads((paths[-1] / "state.json").read_text(encoding="utf-8"))
    return state


def _checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints, oldest first."""
    return sorted(path for path in (folder / CHECKPOINTS).glob("step-*") if path.suffix != PARTIAL)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": tensor.contiguous()
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state[parameter].items()
    }
