"""Configurations: what they refuse, and the parameter counts that they lead to."""

import pytest
import torch

from m2rnn.models import M2RNNConfig, M2RNNForCausalLM, presets


def count(config: M2RNNConfig) -> int:
    with torch.device("meta"):
        return M2RNNForCausalLM(config).num_parameters()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mixers": ["m2rnn", "lstm"]},
            "unknown mixer 'lstm'; known: m2rnn, attention, gru, rnn, gated_deltanet, mamba2",
        ),
        ({"mlps": ["swiglu"] * 3 + ["mixture"]}, "unknown mlp 'mixture'; known: swiglu, moe, none"),
        ({"mixer_options": {"lstm": {}}}, "unknown mixer 'lstm'"),
        (
            {"mixer_options": {"m2rnn": {"heads": 4}}},
            "mixer 'm2rnn' has no option 'heads'; known: num_heads, key_dim",
        ),
        (
            {"mlp_options": {"swiglu": {"size": 4}}},
            "mlp 'swiglu' has no option 'size'; known: intermediate_size",
        ),
        ({"mlp_options": {"none": {"size": 4}}}, "mlp 'none' has no option 'size'"),
        ({"mixers": ["m2rnn"], "mlps": ["swiglu", "none"]}, "got 1 mixers and 2 mlps"),
        ({"mixers": []}, "got 0 mixers"),
    ],
)
def test_bad_configurations_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        M2RNNConfig(**fields)


def test_bad_option_values_are_refused_by_the_layer() -> None:
    with pytest.raises(ValueError, match="num_q_heads must divide"):
        M2RNNForCausalLM(M2RNNConfig(mixer_options={"m2rnn": {"num_heads": 4, "num_q_heads": 3}}))


# The paper's published sizes (arXiv 2603.14360, 410M models), vocabulary 100,352.
PAPER = {
    "vocab_size": 100_352,
    "hidden_size": 1024,
    "mlp_options": {"swiglu": {"intermediate_size": 2752}},
    "mixer_options": {
        "m2rnn": {"num_heads": 84, "key_dim": 64, "value_dim": 16},
        "attention": {"num_heads": 16},
        "gated_deltanet": {"num_heads": 2, "key_dim": 256, "value_dim": 512},
        "mamba2": {"num_heads": 64, "state_size": 216, "inner_size": 1216},
    },
}
HYBRID_GDN = ["gated_deltanet"] * 4 + ["attention"] + ["gated_deltanet"] * 3


@pytest.mark.parametrize(
    ("mixers", "parameters"),
    [
        (presets.layers("M" * 24), 513_497_024),
        (presets.layers("MMMMAMMM" * 3), 512_951_624),
        (presets.layers("A" * 24), 509_133_824),
        (["gated_deltanet"] * 24, 509_441_120),
        (HYBRID_GDN * 3, 509_402_708),
        (["m2rnn", *(HYBRID_GDN * 3)[1:]], 509_571_704),
        (["mamba2"] * 24, 510_545_024),
    ],
    ids=["m2rnn", "hybrid", "attention", "gated_deltanet", "hybrid-gdn", "hybrid-gdn-m2rnn1", "mamba2"],
)
def test_parameter_counts_are_the_published_ones(mixers: list[str], parameters: int) -> None:
    assert count(M2RNNConfig(mixers=mixers, **PAPER)) == parameters


@pytest.mark.parametrize("name", presets.names())
def test_preset_makes_a_model_that_learns(name: str) -> None:
    config = presets.get(name)
    model = M2RNNForCausalLM(config)
    assert model.num_parameters() < 1e6
    ids = torch.randint(config.vocab_size, (2, 8))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown preset 'huge'; known: state-tracking, tiny-m2rnn"):
        presets.get("huge")
    with pytest.raises(ValueError, match="no state-tracking model for mixer 'lstm'"):
        presets.state_tracking("lstm")


def test_state_tracking_models_have_the_same_budget() -> None:
    sizes = [count(presets.state_tracking(mixer)) for mixer in ("m2rnn", "gru", "rnn", "attention")]
    assert max(sizes) < 1.02 * min(sizes)


def test_overrides_reach_single_options() -> None:
    config = presets.state_tracking(
        vocab_size=60, mixer_options={"m2rnn": {"value_dim": 16}}, hidden_size=32, tie_word_embeddings=True
    )
    options = config.mixer_options["m2rnn"]
    assert (options["value_dim"], options["key_dim"], options["weight_init"]) == (16, 8, "normal")
    assert (config.vocab_size, config.hidden_size, config.tie_word_embeddings) == (60, 32, True)
    assert presets.state_tracking().mixer_options["m2rnn"]["value_dim"] == 32
