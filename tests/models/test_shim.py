"""Saved models in processes that have not imported this library, and in those that have not got it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers.utils.hub import PushToHubMixin

from m2rnn.models import M2RNNConfig, M2RNNForSequenceClassification, M2RNNForTokenClassification
from m2rnn.models.shim import AUTO_MAP, SHIM
from tests.models.fresh import WITHOUT_THE_PACKAGE, files, run, save_tokenizer
from tests.models.small import VOCAB, config, make
from tests.tolerances import assert_close


def test_a_fresh_process_loads_uses_and_saves_the_model(tmp_path: Path) -> None:
    model = make("hybrid", torch.float32)
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    code = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
folder, again = sys.argv[1:]
AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
assert "m2rnn" not in sys.modules
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__ == "m2rnn.models.model"
ids = torch.tensor([[1, 3, 4, 5]])
print(model(ids).logits.flatten().tolist())
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "M2RNNModel"
text = pipeline("text-generation", model=folder, trust_remote_code=True)("w3 w4", max_new_tokens=3, do_sample=False)
assert text[0]["generated_text"].startswith("w3 w4")
model.save_pretrained(again)
"""
    printed = run(code, tmp_path / "model", tmp_path / "again", home=tmp_path)
    found = torch.tensor(json.loads(printed.splitlines()[0])).view(1, 4, VOCAB)
    with torch.no_grad():
        assert_close(found, model(torch.tensor([[1, 3, 4, 5]])).logits, torch.float32, "output")
    first, second = files(tmp_path / "model"), files(tmp_path / "again")
    for file in ("config.json", "generation_config.json", f"{SHIM}.py"):
        assert second[file] == first[file], file
    assert {file for file in second if file.endswith(".py")} == {f"{SHIM}.py"}
    assert json.loads(first["config.json"])["auto_map"] == AUTO_MAP
    assert len(first[f"{SHIM}.py"].splitlines()) < 25


def test_without_the_package_the_error_says_how_to_install_it(tmp_path: Path) -> None:
    make("m2rnn", torch.float32).save_pretrained(tmp_path / "model")
    code = """
from transformers import AutoConfig, AutoModelForCausalLM
for auto in (AutoConfig, AutoModelForCausalLM):
    for trust in (True, False):
        try:
            auto.from_pretrained(sys.argv[1], trust_remote_code=trust)
        except (ImportError, ValueError) as error:
            print(type(error).__name__, str(error).replace("\\n", " "))
"""
    with_trust, without, *again = run(WITHOUT_THE_PACKAGE + code, tmp_path / "model", home=tmp_path).splitlines()
    expected = "ImportError this model needs the package m2rnn, which is not installed: pip install m2rnn"
    assert with_trust == expected
    assert "`trust_remote_code=True` to allow custom code" in without
    assert again == [with_trust, without]


def test_transformers_marks_no_class_to_copy_its_file(tmp_path: Path) -> None:
    M2RNNConfig.register_for_auto_class()
    model = make("m2rnn", torch.float32)
    type(model).register_for_auto_class("AutoModelForCausalLM")
    assert model._auto_class is None
    assert model.config._auto_class is None

    class Own(M2RNNConfig):
        model_type = "own"

    Own.register_for_auto_class()
    assert Own._auto_class == "AutoConfig"


def test_the_hub_gets_the_shim_with_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[set[str]] = []

    def upload(self: Any, working_dir: str, repo_id: str, files_timestamps: dict[str, float], **others: Any) -> None:
        times = {path.name: path.stat().st_mtime for path in Path(working_dir).iterdir()}
        sent.append({name for name, time in times.items() if time > files_timestamps.get(name, 0)})

    hub = SimpleNamespace(create_repo=lambda *args, **kwargs: SimpleNamespace(repo_id="a/b"))
    monkeypatch.setattr("transformers.configuration_utils.hf_api", lambda: hub, raising=False)
    monkeypatch.setattr("transformers.configuration_utils.create_repo", hub.create_repo, raising=False)
    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    for _ in range(2):  # also where an earlier one lies
        config().save_pretrained(str(tmp_path), push_to_hub=True)
    assert sent == [{"config.json", f"{SHIM}.py"}] * 2


def test_entries_of_other_files_stay_in_auto_map() -> None:
    own = {"AutoTokenizer": ["words.Tokenizer", None], "AutoModel": "mine.Model"}
    old = {"AutoConfig": f"{SHIM}.Older", "AutoModelForImageTextToText": f"{SHIM}.Later"}
    assert M2RNNConfig(auto_map=own | old).auto_map == AUTO_MAP | own


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_sequence_is_classified_by_its_last_token(padding: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = M2RNNForSequenceClassification(config("hybrid", num_labels=3)).eval()
    model.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    rows = [torch.randint(3, VOCAB, (length,)) for length in (3, 7, 5)]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=padding)
    outputs = model(batch, attention_mask=(batch != 0).long(), labels=torch.tensor([0, 1, 2]))
    for row, logits in zip(rows, outputs.logits, strict=True):
        assert_close(model(row[None]).logits[0], logits, torch.float32, "output")
    outputs.loss.backward()
    assert model.model.embed_tokens.weight.grad.norm() > 0


def test_tokens_are_classified(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = M2RNNForTokenClassification(config("moe", num_labels=4)).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path)
    ids = torch.randint(3, VOCAB, (2, 5))
    outputs = loaded(ids, labels=ids % 4)
    assert outputs.logits.shape == (2, 5, 4)
    assert_close(outputs.logits, model(ids).logits, torch.float32, "output")
    outputs.loss.backward()
    assert loaded.score.weight.grad.norm() > 0
