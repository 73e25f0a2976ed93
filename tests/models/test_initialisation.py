"""Every way to construct a model starts it as intended, and loading gives back the saved bits."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from m2rnn.convert.swapping import load_swapped, swap
from m2rnn.models import M2RNNConfig, M2RNNForCausalLM, M2RNNModel
from m2rnn.models.loss import LanguageModelHead
from tests.convert.hybrids import CLASSES, needs_swap
from tests.convert.hybrids import make as make_hybrid
from tests.models.small import VOCAB, config, make
from tests.tolerances import assert_close


def wide_config(**overrides) -> M2RNNConfig:
    """Wide enough that the statistics of a single layer are sharp."""
    fields = {
        "vocab_size": 300,
        "hidden_size": 128,
        "mixers": ["m2rnn", "attention", "gru"],
        "mixer_options": {"m2rnn": {"num_heads": 600, "key_dim": 4, "value_dim": 4, "weight_init": "normal"}},
        "initializer_range": 0.05,
    }
    return M2RNNConfig(**fields | overrides)


def from_pretrained_without_weights(folder: Path) -> M2RNNForCausalLM:
    """From a checkpoint that lacks all but the embedding: the rest starts fresh after the meta device."""
    model = M2RNNForCausalLM(wide_config())
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "embed_tokens" in name}
    save_file(kept, file, metadata={"format": "pt"})
    return M2RNNForCausalLM.from_pretrained(folder)


def on_the_meta_device(**overrides) -> M2RNNForCausalLM:
    with torch.device("meta"):
        model = M2RNNForCausalLM(wide_config(**overrides))
    model.to_empty(device="cpu")
    for module in model.modules():  # what the meta-device construction marked as done
        module._is_hf_initialized = False
    model.init_weights()
    return model


CONSTRUCTIONS = {
    "constructor": lambda folder: M2RNNForCausalLM(wide_config()),
    "_from_config": lambda folder: M2RNNForCausalLM._from_config(wide_config()),
    "auto": lambda folder: AutoModelForCausalLM.from_config(wide_config()),
    "meta": lambda folder: on_the_meta_device(),
    "from_pretrained": from_pretrained_without_weights,
}


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
@pytest.mark.filterwarnings("default")
def test_initial_statistics(construction: str, tmp_path: Path) -> None:
    model = CONSTRUCTIONS[construction](tmp_path)
    p = {name: parameter.detach() for name, parameter in model.named_parameters()}
    std, narrow = 0.05, 0.05 / math.sqrt(6)

    def is_normal(name: str, expected: float) -> None:
        assert p[name].std().item() == pytest.approx(expected, rel=0.03), name
        assert abs(p[name].mean().item()) < 0.1 * expected, name

    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        is_normal(name, std)
    for layer in range(3):
        is_normal(f"model.layers.{layer}.mixer.out_proj.weight", narrow)
        is_normal(f"model.layers.{layer}.mlp.out_proj.weight", narrow)
        is_normal(f"model.layers.{layer}.mlp.in_proj.weight", std)
        is_normal(f"model.layers.{layer}.mixer.in_proj.weight", std)
    is_normal("model.layers.0.mixer.state_weight", 0.5)
    assert (p["model.layers.0.mixer.D"] == 1).all()
    assert all((value == 1).all() for name, value in p.items() if "norm" in name)
    A = p["model.layers.0.mixer.decay_gate.A_log"].exp()
    dt = F.softplus(p["model.layers.0.mixer.decay_gate.dt_bias"])
    assert A.mean().item() == pytest.approx(8, rel=0.1)
    assert A.std().item() == pytest.approx(16 / math.sqrt(12), rel=0.1)
    assert dt.log().mean().item() == pytest.approx(math.log(1e-2), rel=0.05)
    assert 0.9e-3 < dt.min() < 1.2e-3
    conv = p["model.layers.0.mixer.conv.weight"]
    assert 0.49 < conv.abs().max() <= 0.5
    is_normal("model.layers.2.mixer.state_weight", 0.02)


def test_loading_starts_only_what_the_checkpoint_lacks(tmp_path: Path) -> None:
    model = make(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    lacking = ["layers.0.mixer.decay_gate.dt_bias", "layers.2.mixer.state_weight"]
    saved = load_file(file)
    kept = {name: value for name, value in saved.items() if not name.endswith(tuple(lacking))}
    assert len(kept) == len(saved) - 2
    save_file({name: value + 1 for name, value in kept.items()}, file, metadata={"format": "pt"})
    loaded = M2RNNForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, value in kept.items():
        assert torch.equal(loaded[name], value + 1), name
    dt = F.softplus(loaded["model.layers.0.mixer.decay_gate.dt_bias"])
    assert 1e-4 < dt.min() <= dt.max() < 0.11
    assert 0.015 < loaded["model.layers.2.mixer.state_weight"].std() < 0.025


def test_identity_is_the_default_of_W() -> None:
    model = M2RNNForCausalLM(config("m2rnn"))
    assert torch.equal(model.model.layers[1].mixer.state_weight, torch.eye(4).expand(2, 4, 4))


@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading_gives_the_same_bits(tied: bool, tmp_path: Path) -> None:
    model = make(dtype=torch.float32, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_m2rnn.py",
    ]
    ids = torch.randint(VOCAB, (2, 5))
    for loaded in (
        M2RNNForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert isinstance(loaded, M2RNNForCausalLM)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, M2RNNModel)
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    path = {"_name_or_path": ""}
    assert AutoConfig.from_pretrained(tmp_path).to_dict() | path == model.config.to_dict() | path


def test_float64_models_load_with_the_same_bits(tmp_path: Path) -> None:
    model = make("linear")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # numbers that float32 does not hold
    model.save_pretrained(tmp_path)
    loaded = M2RNNForCausalLM.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_an_embedding_may_start_at_zero() -> None:
    assert M2RNNForCausalLM(config(embedding_range=0.0)).model.embed_tokens.weight.abs().max() == 0


@pytest.mark.parametrize("tied", [False, True])
def test_resized_vocabularies_keep_their_head(tied: bool, tmp_path: Path) -> None:
    model, ids = make(dtype=torch.float32, tie_word_embeddings=tied), torch.randint(VOCAB, (2, 5))
    before = model(ids).logits
    model.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    assert type(model.lm_head) is LanguageModelHead
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_close(model(ids).logits[..., :VOCAB], before, torch.float32, "output")
    model.save_pretrained(tmp_path)
    loaded, more = M2RNNForCausalLM.from_pretrained(tmp_path), torch.full((1, 3), VOCAB + 4)
    assert_close(loaded(more, labels=more).loss, model(more, labels=more).loss, torch.float32, "output")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mean_resizing", [False, True])
@pytest.mark.parametrize("vocab_size", [80, VOCAB - 5])
def test_resized_vocabularies_do_not_start_anew(tied: bool, mean_resizing: bool, vocab_size: int) -> None:
    model, ids = make(dtype=torch.float32, tie_word_embeddings=tied), torch.randint(VOCAB - 5, (2, 5))
    model.resize_token_embeddings(vocab_size, mean_resizing=mean_resizing)
    before, weights = model(ids).logits, {name: value.clone() for name, value in model.state_dict().items()}
    model.post_init()
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert torch.equal(model(ids).logits, before)


@needs_swap
@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("from_file", [False, True])
@torch.no_grad()
def test_swapped_layers_do_not_start_anew_when_the_vocabulary_is_resized(
    family: str, from_file: bool, tmp_path: Path
) -> None:
    model = make_hybrid(family, torch.float32)
    swap(model, [0, 2], num_heads=4)
    if from_file:
        model.save_pretrained(tmp_path)
        model = load_swapped(tmp_path)
    model.resize_token_embeddings(80, mean_resizing=False)
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.post_init()
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name


def test_tied_head_is_the_embedding() -> None:
    model = make(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert make().lm_head.weight is not make().model.embed_tokens.weight
    ids = torch.randint(VOCAB, (2, 5))
    model(ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is model.model.embed_tokens.weight.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forget_gate_stays_float32_when_loaded_in_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    half = make(dtype=torch.float32).to(dtype)
    half.save_pretrained(tmp_path / "half")
    for loaded in (
        M2RNNForCausalLM.from_pretrained(tmp_path, dtype=dtype),
        M2RNNForCausalLM.from_pretrained(tmp_path / "half"),
        M2RNNForCausalLM.from_pretrained(tmp_path / "half", dtype="auto"),
        half,
        M2RNNForCausalLM._from_config(config(), dtype=dtype),
    ):
        gate = {id(p) for block in loaded.model.layers[:1] for p in block.mixer.decay_gate.parameters()}
        for name, parameter in loaded.named_parameters():
            assert parameter.dtype == (torch.float32 if id(parameter) in gate else dtype), name
    for name, value in model.model.layers[0].mixer.decay_gate.named_parameters():
        loaded_value = M2RNNForCausalLM.from_pretrained(tmp_path, dtype=dtype).model.layers[0].mixer.decay_gate
        assert torch.equal(dict(loaded_value.named_parameters())[name], value)


def test_weight_decay_spares_the_gate_and_the_residual() -> None:
    names = make().no_weight_decay()
    mixer = "model.layers.0.mixer"
    gru = "model.layers.2.mixer.state_weight"
    assert names == {f"{mixer}.D", f"{mixer}.decay_gate.A_log", f"{mixer}.decay_gate.dt_bias", gru}
    options = {"m2rnn": {"num_heads": 2, "residual": False}}
    assert not any(name.endswith(".D") for name in make("m2rnn", mixer_options=options).no_weight_decay())


def test_weight_decay_spares_what_other_recurrences_forget_by() -> None:
    gated_deltanet, mamba2 = "model.layers.0.mixer", "model.layers.1.mixer"
    gates = {f"{mixer}.decay_gate.{name}" for mixer in (gated_deltanet, mamba2) for name in ("A_log", "dt_bias")}
    assert make("linear").no_weight_decay() == gates | {f"{mamba2}.D", f"{mamba2}.conv.bias"}


@pytest.mark.parametrize("construction", ["constructor", "meta"])
def test_start_of_the_linear_recurrences(construction: str) -> None:
    options = {"gated_deltanet": {"num_heads": 400, "key_dim": 2, "value_dim": 2}, "mamba2": {"num_heads": 256}}
    fields = {"mixers": ["gated_deltanet", "mamba2"], "mixer_options": options}
    model = M2RNNForCausalLM(wide_config(**fields)) if construction == "constructor" else on_the_meta_device(**fields)
    gated_deltanet, mamba2 = (block.mixer for block in model.model.layers)
    for mixer in (gated_deltanet, mamba2):
        A, dt = mixer.decay_gate.A_log.exp(), F.softplus(mixer.decay_gate.dt_bias)
        assert A.mean().item() == pytest.approx(8, rel=0.15)
        assert dt.log().mean().item() == pytest.approx(math.log(1e-2), rel=0.08)
        assert mixer.in_proj.weight.std().item() == pytest.approx(0.05, rel=0.03)
        assert mixer.out_proj.weight.std().item() == pytest.approx(0.05 / 2, rel=0.03)
        assert 0.49 < mixer.conv.weight.abs().max() <= 0.5
        assert (mixer.norm.weight == 1).all()
    assert (mamba2.D == 1).all()
    assert (mamba2.conv.bias == 0).all()


@pytest.mark.parametrize("construction", ["constructor", "meta", "from_pretrained"])
@pytest.mark.filterwarnings("default")
def test_convolutions_start_as_asked_and_norms_of_heads_at_one(construction: str, tmp_path: Path) -> None:
    names = ["m2rnn", "gru", "rnn", "gated_deltanet", "mamba2"]
    sizes = {"gated_deltanet": {"num_heads": 2, "key_dim": 200, "value_dim": 200}}
    options = {name: {"conv_init": 0.07} | sizes.get(name, {"num_heads": 128}) for name in names}
    options["attention"] = {"num_heads": 4, "qk_norm": True, "window": 5}
    fields = {"mixers": [*names, "attention"], "mixer_options": options}
    if construction == "meta":
        model = on_the_meta_device(**fields)
    else:
        model = M2RNNForCausalLM(wide_config(**fields))
    if construction == "from_pretrained":
        model.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        lacking = ("conv.weight", "q_norm.weight", "k_norm.weight")
        kept = {name: value for name, value in load_file(file).items() if not name.endswith(lacking)}
        save_file(kept, file, metadata={"format": "pt"})
        model = M2RNNForCausalLM.from_pretrained(tmp_path)
    *recurrent, attention = (block.mixer for block in model.model.layers)
    for mixer in recurrent:
        assert mixer.conv.weight.std().item() == pytest.approx(0.07, rel=0.05)
    assert torch.equal(attention.q_norm.weight, torch.ones(32))
    assert torch.equal(attention.k_norm.weight, torch.ones(32))


def test_config_file_is_plain_json(tmp_path: Path) -> None:
    config("hybrid").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "m2rnn"
    assert saved["mixers"] == ["m2rnn", "attention", "gru"]
    assert saved["mixer_options"]["m2rnn"]["key_dim"] == 4
