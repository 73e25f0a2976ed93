"""m2rnn convert: lm-engine's model and this library's are the same function, and the way back restores every bit."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from m2rnn import cli
from m2rnn.convert import ConversionError, convert
from m2rnn.models import M2RNNConfig, M2RNNForCausalLM, presets
from m2rnn.models.shim import AUTO_MAP, SHIM
from tests.convert import lm_engine_by_hand as by_hand
from tests.models.small import make
from tests.tolerances import assert_close

OLDER = ("embedding_init_method", "use_depth_scaled_init", "tie_word_embeddings")


def changed(config: dict[str, Any], blocks: str, **fields: Any) -> dict[str, Any]:
    for block in config[blocks]:
        if blocks != "sequence_mixer_blocks" or fields.keys() <= block.keys():
            block.update(fields)
    return config


def older(config: dict[str, Any]) -> dict[str, Any]:
    """As lm-engine wrote it before it interleaved gate and up; the head is tied where nothing says otherwise."""
    return {name: value for name, value in config.items() if name not in OLDER[:2]}


CASES: dict[str, Any] = {
    "hybrid": by_hand.config(),
    "tied": by_hand.config("MA", tie_word_embeddings=True),
    "m2rnn alone": by_hand.config("MM"),
    "rope": by_hand.config("AA", position_embedding_type="rope", rope_theta=100),
    "head dimension": changed(by_hand.config("AM"), "sequence_mixer_blocks", head_dim=6),
    "multiplier": changed(
        by_hand.config("A"),
        "sequence_mixer_blocks",
        attention_multiplier=0.5,
        attention_multiplier_method=None,
    ),
    "no conv, norm, residual": changed(
        by_hand.config("MA"),
        "sequence_mixer_blocks",
        kernel_size=None,
        activation_function=None,
        normalization_function=None,
        use_residual=False,
        num_v_heads=2,
    ),
    "one v head": changed(by_hand.config("M"), "sequence_mixer_blocks", num_v_heads=1, num_q_heads=3),
    "older": older(by_hand.config()),
    "older, all defaults": {name: value for name, value in by_hand.config().items() if name not in OLDER},
    "older, flags": changed(older(by_hand.config()), "mlp_blocks", use_interleaved_weights=True),
    "moe": by_hand.config("MA", by_hand.MOE_BLOCK),
    "moe, no shared expert": by_hand.config("M", by_hand.MOE_BLOCK | {"shared_intermediate_size": None}),
    "older moe": older(by_hand.config("M", by_hand.MOE_BLOCK | {"use_interleaved_weights": True})),
}
HALVES = {"older": True, "older, all defaults": True, "older moe": True}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype, name
        assert actual[name].shape == x.shape, name
        assert torch.equal(actual[name].view(torch.uint8), x.view(torch.uint8)), name


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_equations_and_the_way_back_restores_every_bit(tmp_path: Path, name: str) -> None:
    config = copy.deepcopy(CASES[name])
    complete = {"tie_word_embeddings": True, **config}
    tensors = by_hand.random_tensors(complete)
    source = by_hand.save(tmp_path / "theirs", config, tensors, shards=1 + (name == "hybrid"))
    converted, back = tmp_path / "ours", tmp_path / "back"
    done = convert(source, converted)
    assert done.to == "m2rnn"
    assert done.parameters == sum(x.numel() for x in tensors.values())
    assert config_of(converted)["auto_map"] == AUTO_MAP
    assert (converted / f"{SHIM}.py").exists()

    ids = torch.randint(by_hand.VOCAB, (2, 7))
    model = M2RNNForCausalLM.from_pretrained(converted).eval()
    assert model.dtype == torch.float64
    model.double()  # the decay gate is float32 in any model that from_pretrained makes
    for parameter, x in tensors_of(converted).items():
        model.get_parameter(parameter).data.copy_(x)
    expected = by_hand.logits(complete, tensors, ids, HALVES.get(name, False))
    with torch.no_grad():
        assert_close(model(ids).logits, expected, torch.float64, "output")

    assert convert(converted, back).to == "lm-engine"
    assert config_of(back) == config
    assert_same_bits(tensors_of(back), tensors)


@pytest.mark.parametrize("name", ["hybrid", "rope", "tied"])
def test_own_models_go_to_lm_engine_and_back(tmp_path: Path, name: str) -> None:
    mixers = {"mixers": ["m2rnn", "attention"], "mlps": ["swiglu"] * 2} if name != "rope" else {}
    model = make("rope" if name == "rope" else "hybrid", tie_word_embeddings=name == "tied", **mixers)
    ours, theirs, back = tmp_path / "ours", tmp_path / "theirs", tmp_path / "back"
    model.save_pretrained(ours)
    assert convert(ours, theirs).to == "lm-engine"
    assert "auto_map" not in config_of(theirs)
    assert not list(theirs.glob("*.py"))
    config, ids = config_of(theirs), torch.randint(by_hand.VOCAB, (2, 7))
    expected = by_hand.logits(config, tensors_of(theirs), ids)
    with torch.no_grad():
        assert_close(model(ids).logits, expected, torch.float64, "output")
    convert(theirs, back)
    assert config_of(back) == config_of(ours)
    assert_same_bits(tensors_of(back), tensors_of(ours))
    assert (back / f"{SHIM}.py").read_bytes() == (ours / f"{SHIM}.py").read_bytes()


def test_halves_on_request_are_an_older_checkpoint_that_tells_so(tmp_path: Path) -> None:
    model = make(mixers=["m2rnn"], mlps=["swiglu"])
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", mlp_layout="halves")
    config, ids = config_of(tmp_path / "theirs"), torch.randint(by_hand.VOCAB, (1, 5))
    expected = by_hand.logits(config, tensors_of(tmp_path / "theirs"), ids, halves=True)
    with torch.no_grad():
        assert_close(model(ids).logits, expected, torch.float64, "output")
    assert convert(tmp_path / "theirs", tmp_path / "back").mlp_layout == "halves, up first"
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "ours"))


def test_the_layout_on_request_wins_over_the_config_and_goes_back(tmp_path: Path) -> None:
    config = by_hand.config("M")
    tensors = by_hand.random_tensors(config)
    by_hand.save(tmp_path / "theirs", config, tensors)
    convert(tmp_path / "theirs", tmp_path / "ours", mlp_layout="halves")
    ids = torch.randint(by_hand.VOCAB, (1, 4))
    model = M2RNNForCausalLM.from_pretrained(tmp_path / "ours").double()
    logits = model(ids).logits.detach()
    assert_close(logits, by_hand.logits(config, tensors, ids, halves=True), torch.float32, "output")
    convert(tmp_path / "ours", tmp_path / "back")
    assert_same_bits(tensors_of(tmp_path / "back"), tensors)


def test_a_model_trained_after_conversion_goes_back_with_new_weights_and_settings(tmp_path: Path) -> None:
    config = by_hand.config()
    by_hand.save(tmp_path / "theirs", config, by_hand.random_tensors(config))
    convert(tmp_path / "theirs", tmp_path / "ours")
    model = M2RNNForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path / "trained")
    convert(tmp_path / "trained", tmp_path / "back")
    assert config_of(tmp_path / "back") == config
    assert torch.equal(tensors_of(tmp_path / "back")["lm_head.weight"], model.lm_head.weight)
    model.config.eos_token_id = 4
    model.save_pretrained(tmp_path / "other")
    convert(tmp_path / "other", tmp_path / "again")
    assert config_of(tmp_path / "again")["eos_token_id"] == 4


def test_bits_and_dtypes_survive_in_16_bits(tmp_path: Path) -> None:
    config = by_hand.config("MA", torch_dtype="bfloat16")
    tensors = by_hand.random_tensors(config, torch.bfloat16)
    tensors["lm_head.weight"][0, :2] = torch.tensor([float("nan"), -0.0])
    by_hand.save(tmp_path / "theirs", config, tensors)
    done = convert(tmp_path / "theirs", tmp_path / "ours")
    assert done.dtypes["float32"] == 2
    model = M2RNNForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.layers[0].mixer.decay_gate.A_log.dtype == torch.float32
    convert(tmp_path / "ours", tmp_path / "back")
    assert_same_bits(tensors_of(tmp_path / "back"), tensors)


def test_the_files_stay_small_and_tokenizer_files_come_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from m2rnn.convert import checkpoint

    held = []
    monkeypatch.setattr(
        checkpoint,
        "save_file",
        lambda tensors, *a, **k: (held.append(sum(x.nbytes for x in tensors.values())), save_file(tensors, *a, **k)),
    )
    config = by_hand.config()
    tensors = by_hand.random_tensors(config)
    source = by_hand.save(tmp_path / "theirs", config, tensors, shards=3)
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("x")
    (source / "modeling.py").write_text("raise SystemExit")
    limit = 14_000
    done = convert(source, tmp_path / "ours", max_shard_size=limit)
    assert max(held) <= limit < sum(held)
    assert done.files == len(held) == len(list((tmp_path / "ours").glob("*.safetensors")))
    assert done.copied == ["chat_template.jinja", "tokenizer.json"]
    assert not (tmp_path / "ours" / "modeling.py").exists()
    model = M2RNNForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


REFUSED = {
    "layer 1: sequence_mixer_type 'mamba2' cannot be converted": lambda c: c["sequence_mixer_blocks"][1].update(
        sequence_mixer_type="mamba2"
    ),
    "the model: m_emb = 12 has no counterpart": lambda c: c.update(m_emb=12),
    "the model: m_width = 4": lambda c: c.update(m_width=4),
    "the model: m_residual = 0.2": lambda c: c.update(m_residual=0.2),
    "position_embedding_type = 'learned_absolute'": lambda c: c.update(position_embedding_type="learned_absolute"),
    "normalization_function = 'layernorm'": lambda c: c.update(normalization_function="layernorm"),
    "rope_scaling": lambda c: c.update(rope_scaling={"factor": 2}),
    "num_layers = 4 blocks, got 3 entries": lambda c: c.update(num_layers=4),
    "has no 'hidden_size'": lambda c: c.pop("hidden_size"),
    "layer 1, sequence_mixer_blocks: attention_multiplier = 0.1 must be null or 1/√head_dim": lambda c: c[
        "sequence_mixer_blocks"
    ][1].update(attention_multiplier=0.1, attention_multiplier_method=None),
    "attention_multiplier_method = '1 / head_dim'": lambda c: c["sequence_mixer_blocks"][1].update(
        attention_multiplier_method="1 / head_dim"
    ),
    "sliding_window = 128": lambda c: c["sequence_mixer_blocks"][1].update(sliding_window=128),
    "attention_gate = True": lambda c: c["sequence_mixer_blocks"][1].update(attention_gate=True),
    "layer 0, sequence_mixer_blocks: unknown field 'spin' = 'up'": lambda c: c["sequence_mixer_blocks"][0].update(
        spin="up"
    ),
    "layer 0, sequence_mixer_blocks: num_g_heads = 3 where the layer has 6 heads": lambda c: c["sequence_mixer_blocks"][
        0
    ].update(num_g_heads=3),
    "layer 2, sequence_mixer_blocks: m2rnn with key_dim = 6, but 5 in layer 0": lambda c: c["sequence_mixer_blocks"][
        2
    ].update(k_head_dim=6),
    "layer 2, sequence_mixer_blocks has no 'kernel_size'": lambda c: c["sequence_mixer_blocks"][2].pop("kernel_size"),
    "layer 0, mlp_blocks: activation_function = 'geglu'": lambda c: c["mlp_blocks"][0].update(
        activation_function="geglu"
    ),
    "layer 1, mlp_blocks: add_bias = True": lambda c: c["mlp_blocks"][1].update(add_bias=True),
    "model_type 'llama': expected 'gpt_base'": lambda c: c.update(model_type="llama"),
    "the model: vocab_size must be a positive whole number, got 0": lambda c: c.update(vocab_size=0),
    "the model: layer_norm_epsilon must be a number, got 'small'": lambda c: c.update(layer_norm_epsilon="small"),
    "config.json: Validation error for field 'tie_word_embeddings'": lambda c: c.update(tie_word_embeddings="no"),
    "layer 0, sequence_mixer_blocks must be an object in config.json, got None": lambda c: c[
        "sequence_mixer_blocks"
    ].__setitem__(0, None),
    "layer 1, mlp_blocks must be an object in config.json, got 'MLP'": lambda c: c["mlp_blocks"].__setitem__(1, "MLP"),
    "layer 0, sequence_mixer_blocks: num_q_heads must be a positive whole number, got None": lambda c: c[
        "sequence_mixer_blocks"
    ][0].update(num_q_heads=None),
    "layer 0, sequence_mixer_blocks: kernel_size must be a positive whole number, got 0": lambda c: c[
        "sequence_mixer_blocks"
    ][0].update(kernel_size=0),
    "layer 0, sequence_mixer_blocks: A_init_max must be a number, got None": lambda c: c["sequence_mixer_blocks"][
        0
    ].update(A_init_max=None),
    "config.json: num_q_heads must divide the number of heads (6), got 4": lambda c: [
        block.update(num_q_heads=4) for block in c["sequence_mixer_blocks"] if "num_q_heads" in block
    ],
    "config.json: num_kv_heads (4) must divide num_heads (6)": lambda c: c["sequence_mixer_blocks"][1].update(
        num_key_value_heads=4
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_without_counterpart_are_named(tmp_path: Path, message: str) -> None:
    config = copy.deepcopy(by_hand.config())
    tensors = by_hand.random_tensors(config)
    REFUSED[message](config)
    by_hand.save(tmp_path / "theirs", config, tensors)
    with pytest.raises(ConversionError, match=re.escape(message)):
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    config = by_hand.config("MA")
    tensors = by_hand.random_tensors(config)
    del tensors["transformer.h.0.sequence_mixer.D"]
    tensors["transformer.h.1.sequence_mixer.c_attn.bias"] = torch.zeros(3)
    tensors["transformer.ln_f.weight"] = torch.ones(7)
    by_hand.save(tmp_path / "theirs", config, tensors)
    with pytest.raises(ConversionError) as error:
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert "transformer.h.0.sequence_mixer.D is missing" in str(error.value)
    assert "transformer.h.1.sequence_mixer.c_attn.bias [3] is unknown" in str(error.value)
    assert "transformer.ln_f.weight has shape [7], config.json makes it [24]" in str(error.value)

    config = by_hand.config("M")
    tensors = by_hand.random_tensors(config)
    by_hand.save(tmp_path / "tied", config | {"tie_word_embeddings": True}, tensors)
    with pytest.raises(ConversionError, match=r"lm_head.weight .* is unknown: tie_word_embeddings is true"):
        convert(tmp_path / "tied", tmp_path / "ours")


def test_own_models_without_counterpart_are_named(tmp_path: Path) -> None:
    for number, (model, message) in enumerate(
        [
            (make("hybrid"), "layer 1: mlp 'none' has no counterpart"),
            (make(mixers=["gru"], mlps=["swiglu"]), "layer 0: mixer 'gru' cannot be converted"),
            (make(mixers=["m2rnn"], mlps=["swiglu"], mixer_options={"m2rnn": {"gate": False}}), "gate = False"),
            (
                make(mixers=["m2rnn"], mlps=["swiglu"], mixer_options={"m2rnn": {"num_heads": 4, "num_f_heads": 2}}),
                "num_f_heads = 2 where the layer has 4 heads",
            ),
            (
                make(mixers=["m2rnn"], mlps=["swiglu"], mixer_options={"m2rnn": {"norm_before_gate": True}}),
                "norm_before_gate = True has no counterpart in lm-engine: its layer gates before it norms",
            ),
            (
                make(mixers=["attention"], mlps=["swiglu"], mixer_options={"attention": {"qk_norm": True}}),
                "attention with qk_norm = True has no counterpart in lm-engine: its attention has no norm",
            ),
            (
                make(mixers=["attention"], mlps=["swiglu"], mixer_options={"attention": {"window": 4}}),
                "attention with window = 4 has no counterpart in lm-engine: only attention to all earlier tokens",
            ),
        ]
    ):
        model.save_pretrained(tmp_path / f"{number}")
        with pytest.raises(ConversionError, match=message):
            convert(tmp_path / f"{number}", tmp_path / "theirs")


def test_how_weights_start_is_no_matter_for_a_checkpoint_and_survives_the_way_back(tmp_path: Path) -> None:
    options = {"m2rnn": {"num_heads": 2, "key_dim": 4, "value_dim": 4, "conv_init": 0.02, "weight_init": "normal"}}
    make(mixers=["m2rnn"], mlps=["swiglu"], mixer_options=options).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "back")
    assert config_of(tmp_path / "back")["mixer_options"] == options


def test_a_layer_without_convolution_and_activation_has_a_counterpart(tmp_path: Path) -> None:
    M2RNNForCausalLM(presets.get("state-tracking", mlps=["swiglu"])).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs")


def test_folders_are_not_overwritten_by_mistake(tmp_path: Path) -> None:
    config = by_hand.config("M")
    source = by_hand.save(tmp_path / "theirs", config, by_hand.random_tensors(config))
    target = tmp_path / "ours"
    convert(source, target)
    (target / "mine").write_text("x")
    with pytest.raises(ConversionError, match="ours exists: choose another folder, or --force"):
        convert(source, target)
    convert(source, target, force=True)
    assert not (target / "mine").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("x")
    with pytest.raises(ConversionError, match="holds no model"):
        convert(source, tmp_path / "other", force=True)
    for where, message in ((source, "is the source"), (source / "inside", "lie in one another")):
        with pytest.raises(ConversionError, match=message):
            convert(source, where, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "ours", "theirs"]


def test_the_folder_is_the_one_that_a_link_names_and_not_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = by_hand.config("M")
    source = by_hand.save(tmp_path / "theirs", config, by_hand.random_tensors(config))
    convert(source, tmp_path / "ours")
    before = tensors_of(tmp_path / "ours")
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    (tmp_path / "ours" / "mine").write_text("x")
    convert(source, tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert not (tmp_path / "ours" / "mine").exists()
    assert_same_bits(tensors_of(tmp_path / "ours"), before)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ConversionError, match="holds the current folder, which is not replaced"):
        convert(source, ".")
    convert(source, "../relative/")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "ours", "relative", "theirs"]


def test_nothing_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from m2rnn.convert import checkpoint

    config = by_hand.config("M")
    source = by_hand.save(tmp_path / "theirs", config, by_hand.random_tensors(config))
    convert(source, tmp_path / "ours")
    before = tensors_of(tmp_path / "ours")

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        convert(source, tmp_path / "ours", force=True)
    assert_same_bits(tensors_of(tmp_path / "ours"), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_broken_folders_are_named(tmp_path: Path) -> None:
    config = by_hand.config("M")
    tensors = by_hand.random_tensors(config)
    with pytest.raises(ConversionError, match=r"config.json cannot be read: No such file"):
        convert(tmp_path / "nowhere", tmp_path / "ours")
    source = by_hand.save(tmp_path / "a", config, tensors)
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConversionError, match=r"pytorch_model.bin is a pickle, which is not read"):
        convert(source, tmp_path / "ours")
    source = by_hand.save(tmp_path / "b", config, tensors, shards=2)
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"model-00002-of-00002.safetensors cannot be read"):
        convert(source, tmp_path / "ours")
    (source / "model-00002-of-00002.safetensors").write_bytes(b"\x08broken")
    with pytest.raises(ConversionError, match=r"model-00002-of-00002.safetensors cannot be read"):
        convert(source, tmp_path / "ours")
    source = by_hand.save(tmp_path / "c", config, tensors | {"lm_head.weight": torch.ones(2, 2, dtype=torch.int8)})
    with pytest.raises(ConversionError, match=r"lm_head.weight holds I8 numbers"):
        convert(source, tmp_path / "ours")
    (source / "config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"config.json is not JSON"):
        convert(source, tmp_path / "ours")
    (source / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(config).encode())  # as some editors begin files
    with pytest.raises(ConversionError, match=r"lm_head.weight holds I8 numbers"):
        convert(source, tmp_path / "ours")


def test_the_papers_configurations_are_understood() -> None:
    """The published hybrid M2RNN: 24 layers of 1,024, attention at 4, 12 and 20, with the published parameter count."""
    from m2rnn.convert.lm_engine import config_to_ours

    config = by_hand.config("MMMMAMMM" * 3, hidden_size=1024, vocab_size=100352)
    changed(
        config,
        "sequence_mixer_blocks",
        k_head_dim=64,
        v_head_dim=16,
        num_q_heads=1,
        num_k_heads=1,
        **{f"num_{name}_heads": 84 for name in ("v", "f", "g", "weight")},
    )
    for block in config["sequence_mixer_blocks"]:
        if "num_attention_heads" in block:
            block.update(num_attention_heads=16, num_key_value_heads=16)
    changed(config, "mlp_blocks", intermediate_size=2752)
    with torch.device("meta"):
        model = M2RNNForCausalLM(M2RNNConfig(**config_to_ours(config)))
    assert sum(p.numel() for p in model.parameters()) == 512_951_624


def test_the_command_prints_a_table_or_json_and_no_traceback(tmp_path: Path) -> None:
    config = by_hand.config()
    source = by_hand.save(tmp_path / "theirs", config, by_hand.random_tensors(config))

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(cli.app, ["convert", *map(str, arguments)])

    result = run(source, tmp_path / "ours")
    assert result.exit_code == 0, result.output
    for line in ("to          m2rnn", "layers      2 m2rnn, 1 attention", "gate and up interleaved"):
        assert line in result.stdout
    back = run(tmp_path / "ours", tmp_path / "back", "--json")
    assert json.loads(back.stdout)["to"] == "lm-engine"
    for arguments, message in (
        ([source, tmp_path / "ours"], "exists: choose another folder"),
        ([source, tmp_path / "new", "--to", "lm-engine"], "of format lm-engine already"),
        ([source, tmp_path / "new", "--to", "gguf"], "to must be m2rnn or lm-engine, got 'gguf'"),
        ([source, tmp_path / "new", "--mlp-layout", "odd"], "mlp_layout must be one of auto, interleaved, halves"),
        ([source, tmp_path / "new", "--max-shard-size", "big"], "max_shard_size 'big'"),
        ([tmp_path / "nowhere", tmp_path / "new"], "cannot be read"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert message in result.stderr
        assert "Traceback" not in result.output
