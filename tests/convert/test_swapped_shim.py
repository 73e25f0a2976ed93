"""Swapped models in fresh processes by their shim, and where nobody reads the record of the swap."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.hub import PushToHubMixin

import m2rnn
from m2rnn.convert.families import SwappedMixer, mixer_of
from m2rnn.models.shim import SWAPPED_SHIM
from tests.convert.hybrids import CLASSES, needs_swap
from tests.convert.test_swap import ATTENTION, ids, swapped
from tests.models.fresh import files, run
from tests.tolerances import assert_close

pytestmark = needs_swap


def test_a_fresh_process_loads_uses_and_saves_swapped_models(tmp_path: Path) -> None:
    models = {family: swapped(family, [0, ATTENTION], torch.float32) for family in ("qwen3_next", "bamba")}
    for family, model in models.items():
        model.save_pretrained(tmp_path / family)
    code = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
assert "m2rnn" not in sys.modules
for folder in sys.argv[1:]:
    eager = {"experts_implementation": "eager"} if "qwen3_next" in folder else {}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **eager).eval()
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    print(model(ids).logits.flatten().tolist())
    base = AutoModel.from_pretrained(folder, trust_remote_code=True, **eager)
    assert type(base.layers[0]).__module__.startswith("transformers.")
    assert any("m2rnn" in name for name, _ in base.named_parameters())
    model.save_pretrained(folder + "-again")
"""
    printed = run(code, *(tmp_path / family for family in models), home=tmp_path).splitlines()
    for line, (family, model) in zip(printed, models.items(), strict=True):
        tokens = torch.tensor([[3, 4, 5, 6, 7]])
        with torch.no_grad():
            expected = model(tokens).logits
        assert_close(torch.tensor(json.loads(line)).view_as(expected), expected, torch.float32, "output", family)
        first, second = files(tmp_path / family), files(tmp_path / f"{family}-again")
        assert {file for file in second if file.endswith(".py")} == {f"{SWAPPED_SHIM}.py"}
        for file in ("config.json", f"{SWAPPED_SHIM}.py"):
            assert second[file] == first[file], (family, file)


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("layer", [0, ATTENTION])
def test_without_the_record_nothing_starts_anew_in_silence(family: str, layer: int, tmp_path: Path) -> None:
    swapped(family, [layer], torch.float32).save_pretrained(tmp_path)
    for load in (AutoModelForCausalLM, CLASSES[family]):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            load.from_pretrained(tmp_path)


@torch.no_grad()
def test_copies_and_pickles_are_swapped_models() -> None:
    model, tokens = swapped("qwen3_5", [0]), ids()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is type(model)
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert isinstance(model, CLASSES["qwen3_5"])


def test_weights_without_the_guard_load_as_before(tmp_path: Path) -> None:
    model = swapped("qwen3_5", [0], torch.float32)
    weights = {name: x for name, x in model.state_dict().items() if x.numel()}
    again = swapped("qwen3_5", [0], torch.float32)
    again.load_state_dict(weights)
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded, told = m2rnn.load_swapped(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    assert isinstance(mixer_of(loaded, 0), SwappedMixer)


def test_the_hub_gets_the_shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[set[str]] = []
    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", lambda self, at, *args: sent.append(names(at)))
    swapped("qwen3_5", [0], torch.float32)._upload_modified_files(str(tmp_path), "a/b", {})
    assert sent == [{f"{SWAPPED_SHIM}.py"}]


def names(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}
