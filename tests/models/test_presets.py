"""Presets: the paper's models to the last parameter, and tiny twins that do all that a model must."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from m2rnn.models import M2RNNConfig, M2RNNForCausalLM, presets
from m2rnn.models.sizes import size_of
from tests.tolerances import assert_close

PAPER = [name for name in presets.names() if name.endswith(("-410m", "-7b"))]
TINY = [name for name in presets.names() if name.startswith("tiny-")]
STATE_TRACKING = [name for name in presets.names() if name.startswith("state-tracking")]

PUBLISHED = {  # total parameters of the models of arXiv 2603.14360
    "m2rnn-410m": 513_497_024,
    "hybrid-m2rnn-410m": 512_951_624,
    "hybrid-gdn-410m": 509_402_708,
    "hybrid-gdn-m2rnn1-410m": 509_571_704,
    "gdn-410m": 509_441_120,
    "mamba2-410m": 510_545_024,
    "transformer-410m": 509_133_824,
    "gru-410m": 577_317_248,
    "rnn-410m": 509_426_048,
    "m2rnn-7b": 6_951_959_360,
    "hybrid-m2rnn-7b": 6_948_251_800,
    "hybrid-gdn-7b": 6_923_069_650,
    "hybrid-gdn-m2rnn1-7b": 6_923_789_140,
    "hybrid-mamba2-7b": 6_945_163_680,
    "transformer-7b": 6_922_298_880,
}


def m2rnn(D: int, N: int) -> int:
    """One q and one k head of 64, N heads of 16: projections, conv, W, D, norm, A_log and dt_bias."""
    qkv, values = 2 * 64 + 16 * N, 16 * N
    return D * (qkv + N + values) + 4 * qkv + 16 * 16 * N + values + values + 2 * N + values * D


def gated_deltanet(D: int, N: int) -> int:
    """Heads of 256 × 512; the norm's weights are shared by the heads."""
    qkv, values = (256 + 256 + 512) * N, 512 * N
    return D * (qkv + N + N + values) + 4 * qkv + 2 * N + 512 + values * D


def mamba2(D: int, N: int, S: int, inner: int) -> int:
    """The convolution over x, B and C has a bias; A_log, dt_bias and D are one number a head."""
    xBC = inner + 2 * S
    return D * (xBC + N + inner) + (4 + 1) * xBC + 3 * N + inner + inner * D


def attention(D: int) -> int:
    return D * 3 * D + D * D


def vector_rnn(D: int, N: int, matrices: int) -> int:
    """``matrices`` inputs, each with a V × V matrix a head; conv on the first alone; gate, norm."""
    units = 16 * N
    return D * (matrices + 1) * units + 4 * units + matrices * N * 16 * 16 + units + units * D


def swiglu(D: int, width: int) -> int:
    return 3 * D * width


def moe(D: int) -> int:
    return 128 * D + 128 * swiglu(D, 256) + swiglu(D, 1024)


SIZES: dict[str, tuple[int, dict[str, int], int]] = {  # width, parameters of each mixer and of an MLP
    "410m": (
        1024,
        {
            "M": m2rnn(1024, 84),
            "G": gated_deltanet(1024, 2),
            "S": mamba2(1024, 64, 216, 1216),
            "A": attention(1024),
            "U": vector_rnn(1024, 85, 3),
            "R": vector_rnn(1024, 85, 1),
        },
        swiglu(1024, 2752),
    ),
    "7b": (
        1536,
        {
            "M": m2rnn(1536, 132),
            "G": gated_deltanet(1536, 3),
            "S": mamba2(1536, 32, 192, 2048),
            "A": attention(1536),
            "U": vector_rnn(1536, 128, 3),
            "R": vector_rnn(1536, 128, 1),
        },
        moe(1536),
    ),
}


def by_hand(pattern: str, size: str) -> int:
    """Embedding and head, the mixers, for each layer an MLP and two norms, the last norm."""
    D, mixers, mlp = SIZES[size]
    return 2 * 100_352 * D + sum(mixers[letter] for letter in pattern) + len(pattern) * (mlp + 2 * D) + D


@pytest.mark.parametrize("name", PAPER)
def test_parameter_counts_are_the_published_ones_and_those_of_the_formulas(name: str) -> None:
    config = presets.get(name)
    size = size_of(config)
    kind = name.rsplit("-", 1)[1]
    assert size.parameters == by_hand(presets.pattern_of(config), kind)
    assert size.parameters == PUBLISHED.get(name, size.parameters)
    unused = 40 * 120 * swiglu(1536, 256) if kind == "7b" else 0
    assert size.active == size.parameters - unused
    assert size.non_embedding == size.parameters - 2 * 100_352 * config.hidden_size


def test_every_published_model_is_a_preset() -> None:
    assert PUBLISHED.keys() <= set(PAPER)
    assert len(PAPER) == 26


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("hybrid-m2rnn-410m", "MMMMAMMMMMMMAMMMMMMMAMMM"),
        ("hybrid-gdn-410m", "GGGGAGGGGGGGAGGGGGGGAGGG"),
        ("hybrid-mamba2-410m", "SSSSASSSSSSSASSSSSSSASSS"),
        ("hybrid-gdn-m2rnn1-410m", "MGGGAGGGGGGGAGGGGGGGAGGG"),
        ("hybrid-mamba2-m2rnn1-410m", "MSSSASSSSSSSASSSSSSSASSS"),
        ("hybrid-gdn-m2rnn3-410m", "GGGMAGGGGGGMAGGGGGGMAGGG"),
        ("hybrid-mamba2-m2rnn3-410m", "SSSMASSSSSSMASSSSSSMASSS"),
        ("hybrid-gdn-m2rnn1-7b", "MGGGAGGGGGGGAGGGGGGGAGGGGGGGAGGGGGGGAGGG"),
        ("hybrid-gdn-m2rnn5-7b", "GGGMAGGGGGGMAGGGGGGMAGGGGGGMAGGGGGGMAGGG"),
        ("transformer-7b", "A" * 40),
    ],
)
def test_patterns_are_the_papers(name: str, pattern: str) -> None:
    config = presets.get(name)
    assert presets.pattern_of(config) == pattern
    assert presets.layers(pattern) == config.mixers


@pytest.mark.parametrize("name", PAPER)
def test_common_settings_are_the_papers(name: str) -> None:
    config = presets.get(name)
    assert (config.vocab_size, config.rms_norm_eps, config.initializer_range) == (100_352, 1e-5, 0.02)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (100_256, 100_257, 100_257)
    assert not config.tie_word_embeddings
    assert config.router_aux_loss_coef == (0.001 if "moe" in config.mlps else 0)
    rope = config.mixer_options.get("attention", {}).get("rope_theta")
    assert rope == (10_000.0 if name.startswith("transformer") else None)
    heads = config.mixer_options.get("attention", {}).get("num_heads", config.hidden_size // 64)
    assert config.hidden_size == 64 * heads


@pytest.mark.parametrize("name", presets.names())
def test_configurations_survive_json(name: str, tmp_path: Path) -> None:
    config = presets.get(name)
    config.save_pretrained(tmp_path)
    for loaded in (M2RNNConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
        assert type(loaded) is M2RNNConfig


def train(model: M2RNNForCausalLM, ids: torch.Tensor, steps: int = 10) -> list[float]:
    """The losses of ``steps`` steps on one batch."""
    decayed = {key: value for key, value in model.named_parameters() if key not in model.no_weight_decay()}
    spared = [value for key, value in model.named_parameters() if key not in decayed]
    groups = [{"params": list(decayed.values())}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 5e-3, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = model.train()(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses


@torch.no_grad()
@pytest.mark.parametrize("name", TINY + STATE_TRACKING)
def test_tiny_model_trains_generates_saves_decodes_and_packs(name: str, tmp_path: Path) -> None:
    config = presets.get(name)
    model = M2RNNForCausalLM(config)
    assert model.num_parameters() < 1e6
    ids = torch.randint(config.vocab_size, (2, 12))
    with torch.enable_grad():
        losses = train(model, ids)
    assert losses[-1] < 0.9 * losses[0]
    assert max(later - earlier for earlier, later in zip(losses, losses[2:], strict=False)) < 0, losses

    model = model.double().eval()
    whole = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = M2RNNForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    assert_close(loaded(ids).logits, whole, torch.float64, "output")

    cache, pieces = None, []
    for piece in ids.split([5, 1, 1, 2, 3], 1):
        outputs = model(piece, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        pieces.append(outputs.logits)
    assert_close(torch.cat(pieces, 1), whole, torch.float64, "output")

    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    padded = model(ids, attention_mask=mask).logits[mask == 1]
    packed = model(ids[mask == 1][None], cu_seq_lens_q=torch.tensor([0, 5, 17])).logits[0]
    assert_close(packed, padded, torch.float64, "output")
    assert_close(packed[5:], whole[1], torch.float64, "output")

    generated = model.generate(ids[:, :5], max_new_tokens=4, do_sample=False)
    expected = ids[:, :5]
    for _ in range(4):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, expected)


def test_new_hybrid_is_one_pattern() -> None:
    config = presets.from_pattern("MSGA", "tiny", hidden_size=32)
    assert config.mixers == ["m2rnn", "mamba2", "gated_deltanet", "attention"]
    assert config.mixer_options.keys() == set(config.mixers)
    assert (config.hidden_size, config.mlps) == (32, ["swiglu"] * 4)
    ids = torch.randint(512, (1, 6))
    assert M2RNNForCausalLM(config)(ids).logits.shape == (1, 6, 512)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: presets.get("tiny-m2rnn", hiden_size=32), "unknown field 'hiden_size' of M2RNNConfig; .*hidden_size"),
        (lambda: presets.get("huge"), "unknown preset 'huge'; known: m2rnn-410m, gdn-410m"),
        (lambda: presets.state_tracking("lstm"), "no state-tracking model for mixer 'lstm'; there are 'm2rnn', 'gru'"),
        (lambda: presets.layers("MX"), "unknown letter 'X' in pattern 'MX'; known: M m2rnn, A attention"),
        (lambda: presets.from_pattern("M", "8b"), "unknown size '8b'; known: 410m, 7b, tiny"),
    ],
)
def test_unknown_names_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", STATE_TRACKING)
def test_state_tracking_models_have_the_same_budget(name: str) -> None:
    assert size_of(presets.get(name)).parameters == pytest.approx(59_000, rel=0.02)


PLAIN = {"conv_size": None, "activation": None}
DELTA = {"key_dim": 16, "value_dim": 32, **PLAIN}


@pytest.mark.parametrize(
    ("mixer", "pattern", "options"),  # beyond the number of parameters, which other options would leave as it is
    [
        (
            "m2rnn",
            "M",
            {"num_heads": 8, "num_q_heads": 8, "num_k_heads": 8, "key_dim": 4, "value_dim": 32, "weight_init": "normal"}
            | {"A_range": [4.0, 16.0], "dt_range": [0.3, 1.0], **PLAIN},
        ),
        ("gru", "U", {"num_heads": 3, "head_dim": 32, "gate": False, "weight_std": None, **PLAIN}),
        ("rnn", "R", {"num_heads": 4, "head_dim": 48, "gate": False, "weight_std": None, **PLAIN}),
        ("gated_deltanet", "G", {"num_heads": 4, **DELTA}),
        ("gated_deltanet_negative", "G", {"num_heads": 4, "negative_eigenvalues": True, **DELTA}),
        (
            "gated_deltaproduct2",
            "G",
            {"num_heads": 3, "num_householder": 2, "negative_eigenvalues": True, **DELTA},
        ),
        ("mamba2", "S", {"num_heads": 4, "state_size": 64, "inner_size": 128, **PLAIN}),
        ("attention", "AA", {"num_heads": 4, "rope_theta": 10_000.0}),
    ],
)
def test_state_tracking_models_are_the_documented_ones(mixer: str, pattern: str, options: dict[str, object]) -> None:
    config = presets.state_tracking(mixer)
    assert presets.pattern_of(config) == pattern
    assert config.mixer_options == {config.mixers[0]: options}
    assert config.mlps == (["none"] if mixer == "m2rnn" else ["swiglu"] * len(pattern))
    assert config.embedding_range == 1.0


def test_overrides_reach_single_options() -> None:
    config = presets.state_tracking(
        vocab_size=60, mixer_options={"m2rnn": {"value_dim": 16}}, hidden_size=32, tie_word_embeddings=True
    )
    options = config.mixer_options["m2rnn"]
    assert (options["value_dim"], options["key_dim"], options["weight_init"]) == (16, 4, "normal")
    assert (config.vocab_size, config.hidden_size, config.tie_word_embeddings) == (60, 32, True)
    assert presets.state_tracking().mixer_options["m2rnn"]["value_dim"] == 32
    assert presets.state_tracking(mixers=["m2rnn", "m2rnn"]).mlps == ["none", "none"]
    experts = presets.get("tiny-moe-m2rnn", mlp_options={"moe": {"num_experts": 4}}).mlp_options["moe"]
    assert experts == presets.get("tiny-moe-m2rnn").mlp_options["moe"] | {"num_experts": 4}


@pytest.mark.parametrize("name", TINY)
def test_weight_decay_spares_gates_residuals_and_recurrent_matrices_of_every_mixer(name: str) -> None:
    """What is left to decay is matrices, convolutions and norms."""
    model = M2RNNForCausalLM(presets.get(name))
    spared = model.no_weight_decay()
    endings = {
        "m2rnn": {"A_log", "dt_bias", "D"},
        "gated_deltanet": {"A_log", "dt_bias"},
        "mamba2": {"A_log", "dt_bias", "D", "bias"},
        "gru": {"state_weight"},
        "rnn": {"state_weight"},
        "attention": set(),
    }
    for layer, mixer in enumerate(model.config.mixers):
        mine = {key for key in spared if key.startswith(f"model.layers.{layer}.")}
        assert {key.rsplit(".", 1)[1] for key in mine} == endings[mixer]
    for key, parameter in model.named_parameters():
        assert key in spared or parameter.dim() > 1 or "norm" in key, key


@pytest.mark.parametrize("construction", ["constructor", "after the meta device"])
def test_mixers_start_as_the_paper_says_at_their_full_size(construction: str) -> None:
    """A layer of each at the width of the 410M models; a small MLP and vocabulary, which are not under test."""
    config = presets.from_pattern("MGSAUR", vocab_size=16, mlp_options={"swiglu": {"intermediate_size": 8}})
    if construction == "constructor":
        model = M2RNNForCausalLM(config)
    else:
        with torch.device("meta"):
            model = M2RNNForCausalLM(config)
        model.to_empty(device="cpu")
        for module in model.modules():  # what the construction marked as done
            module._is_hf_initialized = False
        model.init_weights()
    mixers = dict(zip(config.mixers, [block.mixer for block in model.model.layers], strict=True))

    def is_normal(weight: torch.Tensor, std: float) -> None:
        assert weight.std().item() == pytest.approx(std, rel=0.02)
        assert abs(weight.mean().item()) < 0.02 * std

    for mixer in mixers.values():
        is_normal(mixer.in_proj.weight, 0.02)
        is_normal(mixer.out_proj.weight, 0.02 / math.sqrt(2 * 6))
        if hasattr(mixer, "norm"):
            assert (mixer.norm.weight == 1).all()
    assert torch.equal(mixers["m2rnn"].state_weight, torch.eye(16).expand(84, 16, 16))
    for name in ("m2rnn", "mamba2"):
        assert (mixers[name].D == 1).all()
    for name, heads in (("m2rnn", 84), ("gated_deltanet", 2), ("mamba2", 64)):
        gate = mixers[name].decay_gate
        A, dt = gate.A_log.exp(), F.softplus(gate.dt_bias)
        assert A.shape == dt.shape == (heads,)
        assert A.dtype == dt.dtype == torch.float32
        assert 1e-4 <= A.min() < A.max() <= 16
        assert 1e-3 * 0.999 <= dt.min() < dt.max() <= 0.1 * 1.001
    gate = mixers["m2rnn"].decay_gate
    uniform = [gate.A_log.exp() / 16, (F.softplus(gate.dt_bias).log() - math.log(1e-3)) / math.log(100)]
    for draws in uniform:  # Kolmogorov-Smirnov at 84 draws, beyond one chance in ten thousand
        ranks = torch.arange(1, 85) / 84
        assert (draws.sort().values - ranks).abs().max() < 2.2 / math.sqrt(84) + 1 / 84


@pytest.mark.parametrize("name", ["m2rnn-410m", "hybrid-gdn-m2rnn1-7b"])
def test_a_model_on_the_meta_device_has_the_papers_layers(name: str) -> None:
    with torch.device("meta"):
        model = M2RNNForCausalLM(presets.get(name))
    mixer = model.model.layers[0].mixer
    D, heads = (1024, 84) if name == "m2rnn-410m" else (1536, 132)
    shapes = {key: tuple(parameter.shape) for key, parameter in mixer.named_parameters()}
    assert shapes == {
        "in_proj.weight": (64 + 64 + 16 * heads + heads + 16 * heads, D),
        "conv.weight": (64 + 64 + 16 * heads, 1, 4),
        "decay_gate.A_log": (heads,),
        "decay_gate.dt_bias": (heads,),
        "state_weight": (heads, 16, 16),
        "D": (heads, 16),
        "norm.weight": (16 * heads,),
        "out_proj.weight": (D, 16 * heads),
    }
    assert mixer.state_clip == 1.0
    assert mixer.activation == "silu"
    layers = model.config.num_hidden_layers
    assert len(model.no_weight_decay()) == (3 * layers if name == "m2rnn-410m" else 3 + 2 * 34)
