"""The examples of docs/swap-and-convert.md run as they stand."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert import lm_engine_by_hand as by_hand
from tests.convert.hybrids import VOCAB, make, needs_swap

DOCS = (Path(__file__).parents[2] / "docs" / "swap-and-convert.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"## ([\w' ]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", DOCS, flags=re.DOTALL))


def test_the_authors_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = by_hand.config("MMA")
    by_hand.save(tmp_path / "hybrid-m2rnn-410m", config, by_hand.random_tensors(config))
    scope: dict[str, Any] = {}
    exec(EXAMPLES["The authors' checkpoints"], scope)
    assert scope["model"].config.mixers == ["m2rnn", "m2rnn", "attention"]
    assert "2 m2rnn, 1 attention" in scope["done"].table()


@needs_swap
def test_swapping_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make("qwen3_5", torch.float32)
    before = model
    scope: dict[str, Any] = {"model": model, "batches": [torch.randint(VOCAB, (2, 8))]}
    exec(EXAMPLES["Swapping a layer"].replace("calibration=batches", "calibration=batches, steps=3"), scope)
    groups = scope["optimizer"].param_groups
    assert len(groups[0]["params"]) + len(groups[1]["params"]) == len(list(before.parameters()))
    assert scope["model"] is not before
    tokens = torch.randint(VOCAB, (1, 6))
    assert torch.equal(scope["model"](tokens).logits, before(tokens).logits)
