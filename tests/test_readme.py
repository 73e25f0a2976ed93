"""The README's Python examples run as they stand."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"## (The \w+)\n(?:(?!\n## ).)*?```python\n(.*?)```", README, flags=re.DOTALL))


def run(name: str) -> dict[str, Any]:
    scope: dict[str, Any] = {}
    exec(EXAMPLES[name], scope)
    return scope


@pytest.mark.parametrize("name", ["The operator", "The layer", "The model"])
def test_example_is_ten_lines_at_most(name: str) -> None:
    code = EXAMPLES[name].split("\n\n", 1)[1].rstrip()  # without the imports
    assert len(code.splitlines()) <= 10


def test_operator_example_gives_outputs_state_and_gradients() -> None:
    scope = run("The operator")
    assert scope["y"].shape == (2, 100, 12, 16)
    assert scope["state"].shape == (2, 12, 64, 16)
    assert scope["v"].grad.abs().sum() > 0


def test_layer_example_decodes_what_one_pass_gives() -> None:
    scope = run("The layer")
    x, layer = scope["x"], scope["layer"]
    first, state = layer(x[:, :30])
    rest, _ = layer(x[:, 30:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), scope["y"])
    assert scope["next_y"].shape == (2, 1, 128)


def test_model_example_generates() -> None:
    assert run("The model")["tokens"].shape == (1, 16)
