"""Sizes: states are what a cache holds, work is what the formulas of the documentation say."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from m2rnn.models import M2RNNForCausalLM, presets
from m2rnn.models.sizes import size_of

HYBRIDS = ["tiny-hybrid-gdn-m2rnn2", "tiny-moe-hybrid-mamba2-m2rnn2", "tiny-gru", "tiny-rnn", "state-tracking-mamba2"]


@pytest.mark.parametrize("name", HYBRIDS)
def test_state_and_cache_are_what_generation_keeps(name: str) -> None:
    config = presets.get(name)
    cache = M2RNNForCausalLM(config).eval()(torch.randint(config.vocab_size, (1, 9))).past_key_values
    size = size_of(config)
    state = kv_cache = 0
    for mixer, layer in zip(config.mixers, cache.layers, strict=True):
        if mixer == "attention":
            kv_cache += (layer.state.keys.numel() + layer.state.values.numel()) // 9
            continue
        assert size.state_per_layer[mixer] == layer.state.recurrent.numel()
        assert size.conv_per_layer.get(mixer, 0) == (0 if layer.state.conv is None else layer.state.conv.numel())
        state += layer.state.recurrent.numel()
    assert (size.state, size.kv_cache) == (state, kv_cache)


def test_the_papers_state_is_a_third_of_gated_deltanets() -> None:
    size = size_of(presets.get("hybrid-gdn-m2rnn1-7b"))
    assert size.state_per_layer == {"m2rnn": 135_168, "gated_deltanet": 393_216}


@pytest.mark.parametrize(
    ("name", "mixing"),  # floating-point operations of one token in the forward pass, beyond two for each parameter
    [
        ("transformer-410m", 24 * 2 * 1001 * 1024),
        ("m2rnn-410m", 24 * 84 * (64 * 16 * (2 * 16 + 7) - 2 * 16 * 16)),
        ("gdn-410m", 24 * 2 * 256 * 512 * 7),
        ("hybrid-mamba2-410m", 21 * 1216 * 216 * 5 + 3 * 2 * 1001 * 1024),
        ("gru-7b", 0),
        ("hybrid-gdn-7b", 35 * 3 * 256 * 512 * 7 + 5 * 2 * 1001 * 1536),
        ("state-tracking-gated_deltaproduct2", 3 * 16 * 32 * 11),
    ],
)
def test_training_work_follows_the_formula(name: str, mixing: int) -> None:
    config = presets.get(name)
    size = size_of(config, context=1000)
    embedding = config.vocab_size * config.hidden_size
    assert size.training_flops == 3 * (2 * (size.active - embedding) + mixing)


def test_work_of_attention_is_that_of_the_matrix_products() -> None:
    """Counted by torch, where it is exact: products of all positions with all others, causality not subtracted."""
    config = presets.get("tiny-transformer")
    model, steps = M2RNNForCausalLM(config), 32
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randint(512, (1, steps)))
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - 512 * 64
    norms = size_of(config).parameters - 512 * 64 - matrices
    causal = size_of(config, context=steps).training_flops // 3 - 2 * norms
    hidden_positions = 2 * 2 * (steps - 1) * 64  # two layers; 2 (2 T - (T + 1)) for each channel
    assert counter.get_total_flops() == steps * (causal + hidden_positions)


@pytest.mark.parametrize(("window", "context"), [(1, 32), (5, 32), (31, 32), (32, 32), (99, 32), (1024, 4096)])
def test_work_of_a_window_is_that_of_the_tokens_it_sees(window: int, context: int) -> None:
    def work(**options) -> int:
        attention = {"num_heads": 4, "head_dim": 8} | options
        config = presets.get("tiny-transformer", mixer_options={"attention": attention})
        return size_of(config, context).training_flops

    pairs = sum(min(t, window) for t in range(1, context + 1))
    all_pairs = context * (context + 1) // 2
    saved = 3 * 2 * (4 * 4 * 8 * all_pairs // context - 4 * 4 * 8 * pairs // context)  # backward too, in two layers
    assert work() - work(window=window) == saved


def test_norms_of_queries_and_keys_count_as_parameters() -> None:
    plain, normed = (
        size_of(presets.get("tiny-transformer", mixer_options={"attention": {"num_heads": 4, "qk_norm": on}}))
        for on in (False, True)
    )
    assert normed.per_layer["attention"] - plain.per_layer["attention"] == 2 * 16
    assert normed.kv_cache == plain.kv_cache


def test_parameters_of_a_layer_are_those_of_its_mixer_and_mlp() -> None:
    config = presets.from_pattern("MAG", "tiny", mlps=["swiglu", "none", "swiglu"])
    layers = M2RNNForCausalLM(config).model.layers
    modules = {name: layer.mixer for name, layer in zip(config.mixers, layers, strict=True)} | {"swiglu": layers[0].mlp}
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    assert size_of(config).per_layer == counts


def test_work_is_that_of_contexts_of_4096_tokens_unless_told() -> None:
    config = presets.get("tiny-transformer")
    assert size_of(config) == size_of(config, context=4096)


def test_sharing_the_embedding_counts_it_once() -> None:
    free, tied = (size_of(presets.get("tiny-rnn", tie_word_embeddings=tied)) for tied in (False, True))
    assert free.parameters - tied.parameters == 512 * 64
    assert (free.non_embedding, free.training_flops) == (tied.non_embedding, tied.training_flops)


def test_a_context_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        size_of(presets.get("tiny-rnn"), context=0)
