"""Configurations: what they refuse."""

import pytest

from m2rnn.models import M2RNNConfig, M2RNNForCausalLM


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
        ({"num_hidden_layers": 12}, "num_hidden_layers follows from mixers, which names 4 layers, got 12"),
    ],
)
def test_bad_configurations_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        M2RNNConfig(**fields)


def test_bad_option_values_are_refused_by_the_layer() -> None:
    with pytest.raises(ValueError, match="num_q_heads must divide"):
        M2RNNForCausalLM(M2RNNConfig(mixer_options={"m2rnn": {"num_heads": 4, "num_q_heads": 3}}))


def test_fields_that_are_changed_later_are_checked_by_the_model() -> None:
    for field, value, message in (
        ("mixers", ["m2rnn"] * 5, "got 5 mixers and 4 mlps"),
        ("mixers", ["m2rnn"] * 3 + ["lstm"], "unknown mixer 'lstm'"),
        ("mixer_options", {"m2rnn": {"heads": 4}}, "mixer 'm2rnn' has no option 'heads'"),
    ):
        config = M2RNNConfig(vocab_size=8)
        setattr(config, field, value)
        with pytest.raises(ValueError, match=message):
            M2RNNForCausalLM(config)


def test_the_number_of_layers_may_be_given_too() -> None:
    assert M2RNNConfig(mixers=["m2rnn"] * 3, num_hidden_layers=3).num_hidden_layers == 3


def test_whole_numbers_are_numbers() -> None:
    config = M2RNNConfig(router_aux_loss_coef=0, embedding_range=1)
    assert (config.router_aux_loss_coef, config.embedding_range) == (0, 1)
