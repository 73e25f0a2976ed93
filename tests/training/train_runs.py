"""Small trainings, and what they leave that the clock does not write."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from m2rnn.training.train_settings import load_settings
from tests.training.train_and_kill import SETTINGS


def settings_of(data: str, *overrides: str):
    return load_settings(None, [*SETTINGS, *overrides], {"data": data})


def log_of(folder: Path) -> list[dict]:
    """The log without what the clock writes."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


def assert_same_run(folder: Path, expected: Path) -> None:
    assert log_of(folder) == log_of(expected)
    weights = Path("model", "model.safetensors")
    assert (folder / weights).read_bytes() == (expected / weights).read_bytes()
