"""The examples of docs/other-tools.md run as they stand, one after the other."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import m2rnn.models  # noqa: F401 # in this process there is no need to run the shim
from tests.models.fresh import save_tokenizer
from tests.models.small import make

DOCS = (Path(__file__).parents[2] / "docs" / "other-tools.md").read_text(encoding="utf-8")
pytest.importorskip("peft")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of its modules
    pytest.importorskip("trl")


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")  # TRL's and PEFT's
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    make("hybrid", torch.float32).save_pretrained("model")
    save_tokenizer(tmp_path / "model")
    scope: dict[str, Any] = {}
    examples = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        exec(example.replace('report_to="none"', 'report_to="none", use_cpu=True'), scope)
    assert "trainable params" in capsys.readouterr().out
