"""A cut checkpoint is the same model but for W and what config.json says of its bound."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import m2rnn
from m2rnn.cli import app
from m2rnn.convert import ConversionError, convert, cut_state_weights
from m2rnn.layers.state_weight import bound_
from m2rnn.models import M2RNNForCausalLM
from tests.convert.hybrids import make as make_hybrid
from tests.convert.hybrids import needs_swap
from tests.models.small import make

BOUND = 0.5
W = ("model.layers.0.mixer.state_weight",)  # of the hybrid; layer 2 is a GRU, whose weight has the same name


def save(folder: Path, name: str = "hybrid", dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """A model whose W are random, as training leaves them, with what a tokenizer writes."""
    model = make(name, dtype, **overrides)
    with torch.no_grad():
        for layer in model.model.layers:
            if hasattr(layer.mixer, "state_weight"):
                layer.mixer.state_weight.normal_()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_cut(out: Path, source: Path, names: tuple[str, ...], heads: int | None = None) -> None:
    """All tensors keep their bits and dtype, but these, which are cut."""
    found, expected = weights_of(out), weights_of(source)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name in names:
            before = tensor.clone()
            bound_(tensor, BOUND, heads)
            assert not torch.equal(before, tensor)
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [None, 1])
def test_only_W_is_cut_and_the_model_says_so(heads: int | None, dtype: torch.dtype, tmp_path: Path) -> None:
    source, out = save(tmp_path / "model", dtype=dtype), tmp_path / "new" / "cut"
    values = torch.linalg.svdvals(weights_of(source)[W[0]].double())[:heads]
    done = cut_state_weights(source, out, BOUND, heads)
    assert_cut(out, source, W, heads)
    assert (done.layers, done.heads) == (1, heads or 2)
    assert done.over == (values.amax(-1) > BOUND).sum()
    assert done.largest == pytest.approx(values.max().item())
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_m2rnn.py",
        "tokenizer.json",
    ]
    model, before = (M2RNNForCausalLM.from_pretrained(folder) for folder in (out, source))
    (layer,) = (module for module in model.modules() if isinstance(module, m2rnn.M2RNN))
    assert (layer.state_weight_bound, layer.bounded_heads) == (BOUND, heads)
    assert m2rnn.bound_state_weights(model) == 1
    options = before.config.mixer_options
    options["m2rnn"] |= {"state_weight_bound": BOUND, "bounded_heads": heads}
    assert model.config.mixer_options == options
    tokens = torch.arange(8)[None]
    assert (model(tokens).logits - before(tokens).logits).abs().max() > 1e-3


def test_a_model_in_shards_stays_one_and_options_may_be_the_defaults(tmp_path: Path) -> None:
    source = save(tmp_path / "model", "m2rnn", mixer_options={})
    out = tmp_path / "cut"
    cut_state_weights(source, out, BOUND, max_shard_size=4000)
    assert len(list(out.glob("*.safetensors"))) > 1
    assert_cut(out, source, tuple(f"model.layers.{i}.mixer.state_weight" for i in range(2)))
    assert M2RNNForCausalLM.from_pretrained(out).config.mixer_options["m2rnn"]["state_weight_bound"] == BOUND


def test_no_heads_cut_nothing(tmp_path: Path) -> None:
    source, out = save(tmp_path / "model"), tmp_path / "cut"
    done = cut_state_weights(source, out, BOUND, 0)
    assert (done.heads, done.over, done.largest) == (0, 0, 0.0)
    assert_cut(out, source, ())


@needs_swap
def test_swapped_layers_are_cut(tmp_path: Path) -> None:
    model = make_hybrid("qwen3_next", torch.float32)
    new = m2rnn.swap(model, [0, 3], num_heads=6, key_dim=8, value_dim=8)
    names = tuple(name for name in new if name.endswith("state_weight"))
    for name in names:
        torch.nn.init.normal_(new[name])
    model.save_pretrained(tmp_path / "swapped")
    out = tmp_path / "cut"
    assert cut_state_weights(tmp_path / "swapped", out, BOUND, 4).layers == 2
    assert_cut(out, tmp_path / "swapped", names, 4)
    loaded = m2rnn.load_swapped(out, experts_implementation="eager")
    layers = [module for module in loaded.modules() if isinstance(module, m2rnn.M2RNN)]
    assert [(layer.state_weight_bound, layer.bounded_heads) for layer in layers] == [(BOUND, 4)] * 2


@pytest.mark.parametrize(
    ("bound", "heads", "message"),
    [
        (0.0, None, r"state_weight_bound 0\.0: expected a number above 0"),
        (float("nan"), None, "state_weight_bound nan"),
        (0.9, 3, "bounded_heads 3: expected 0 to the number of heads of W, which is 2"),
    ],
)
def test_wrong_bounds_are_named_and_nothing_is_written(
    bound: float, heads: int | None, message: str, tmp_path: Path
) -> None:
    source = save(tmp_path / "model")
    with pytest.raises(ConversionError, match=message):
        cut_state_weights(source, tmp_path / "cut", bound, heads)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def without_m2rnn(folder: Path) -> None:
    shutil.rmtree(folder)
    save(folder, "rnn")


def with_config(**fields: Any) -> Any:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def with_weight(name: str, weight: Tensor | None) -> Any:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors if weight is None else tensors | {name: weight}, folder / "model.safetensors")

    return change


HARMED = {
    "model has no M2RNN layer": without_m2rnn,
    "model_type 'llama': expected 'm2rnn'": with_config(model_type="llama"),
    "convert it with m2rnn convert first": with_config(model_type="gpt_base"),
    "expected one tensor layers.0.*.mixer.state_weight, found 0": with_weight(W[0], None),
    f"{W[0]} holds a NaN or an infinity": with_weight(W[0], torch.full((2, 4, 4), torch.nan)),
    "cannot be read": lambda folder: (folder / "config.json").unlink(),
}


@pytest.mark.parametrize("message", HARMED)
def test_a_folder_that_cannot_be_cut_is_named_and_nothing_is_written(message: str, tmp_path: Path) -> None:
    source = save(tmp_path / "model")
    HARMED[message](source)
    with pytest.raises(ConversionError, match=re.escape(message)):
        cut_state_weights(source, tmp_path / "cut", BOUND)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(ConversionError, match="model exists: choose another folder"):
        cut_state_weights(source, source, BOUND)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_the_command_cuts_and_refuses_options_of_a_conversion(tmp_path: Path) -> None:
    source = save(tmp_path / "model")

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["convert", *map(str, arguments)])

    done = run(source, tmp_path / "cut", "--state-weight-bound", BOUND, "--bounded-heads", 1)
    assert done.exit_code == 0, done.output
    assert re.search(r"bound +0\.5\nheads +1 of W in 1 layer, [01] above the bound", done.stdout)
    assert_cut(tmp_path / "cut", source, W, 1)
    told = run(source, tmp_path / "told", "--state-weight-bound", BOUND, "--json")
    assert json.loads(told.stdout)["heads"] == 2
    for arguments, message in (
        (["--bounded-heads", 1], "bounded_heads 1: expected --state-weight-bound with it"),
        (["--state-weight-bound", 0], "state_weight_bound 0"),
        (["--state-weight-bound", 0.9, "--force"], "leave out --to, --mlp-layout and --force"),
        (["--state-weight-bound", 0.9, "--to", "lm-engine"], "leave out --to"),
    ):
        failed = run(source, tmp_path / "new", *arguments)
        assert failed.exit_code == 2
        assert message in failed.stderr
        assert not (tmp_path / "new").exists()


def test_lm_engine_is_said_not_to_store_the_bound_and_the_way_back_restores_it(tmp_path: Path) -> None:
    options = {"m2rnn": {"num_heads": 2, "key_dim": 4, "value_dim": 4, "state_weight_bound": BOUND}}
    source = save(tmp_path / "ours", "m2rnn", mixer_options=options)
    done = convert(source, tmp_path / "theirs")
    assert len(done.notes) == 1
    assert "lm-engine has no state_weight_bound (0.5)" in done.table().splitlines()[-1]
    back = convert(tmp_path / "theirs", tmp_path / "back")
    assert back.notes == []
    assert json.loads((tmp_path / "back" / "config.json").read_text())["mixer_options"] == options
    assert convert(save(tmp_path / "free", "m2rnn"), tmp_path / "other").notes == []
