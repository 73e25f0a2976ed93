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
    config = M2RNNConfig(mlps=["moe"] * 4, router_aux_loss_coef=0, embedding_range=1)
    assert (config.router_aux_loss_coef, config.embedding_range) == (0, 1)


def test_names_that_other_libraries_read_are_true_or_absent() -> None:
    options = {"attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 24}, "m2rnn": {"num_heads": 6}}
    hybrid = M2RNNConfig(
        hidden_size=64, mixers=["m2rnn", "attention"], mixer_options=options, mlps=["swiglu", "none"], vocab_size=8
    )
    model = M2RNNForCausalLM(hybrid).model
    assert names_in(hybrid) == {
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "intermediate_size": model.layers[0].mlp.out_proj.in_features,
    }
    assert model.layers[1].mixer.head_dim == 24
    recurrent = M2RNNConfig(mixers=["m2rnn", "gru"], mixer_options={"m2rnn": {"num_heads": 4}, "gru": {"num_heads": 4}})
    assert names_in(recurrent) == {"layer_types": ["linear_attention"] * 2, "num_heads": 4, "intermediate_size": 704}
    mixture = M2RNNConfig(
        mixers=["attention"] * 2,
        mlps=["moe", "none"],
        mixer_options={"attention": {"window": 16}},
        mlp_options={"moe": {"num_experts": 6, "num_experts_per_tok": 2}},
    )
    assert names_in(mixture) == {
        "layer_types": ["sliding_attention"] * 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "sliding_window": 16,
        "num_heads": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    }
    assert not any(hasattr(each, "max_position_embeddings") for each in (hybrid, recurrent, mixture))


def names_in(config: M2RNNConfig) -> dict:
    """The derived fields that the configuration has; a saved and loaded one has the same, and no other value fits."""
    found = {name: getattr(config, name) for name in M2RNNConfig.DERIVED if hasattr(config, name)}
    saved = config.to_diff_dict()
    assert {name: saved[name] for name in M2RNNConfig.DERIVED if name in saved} == found
    assert M2RNNConfig.from_dict(saved).to_dict() == config.to_dict()
    for name in M2RNNConfig.DERIVED:
        with pytest.raises(ValueError, match=rf"{name} follows from .* make it .*, got 9: change those"):
            setattr(config, name, 9)
    return found


def test_router_logits_are_none_without_experts_and_old_files_load_so() -> None:
    assert M2RNNConfig.from_dict({"output_router_logits": False}).output_router_logits is None
    assert M2RNNConfig(router_aux_loss_coef=0.01).router_aux_loss_coef == 0
    assert M2RNNConfig(mlps=["moe"] * 4).output_router_logits is False
    assert M2RNNConfig(mlps=["moe"] * 4, output_router_logits=True).output_router_logits is True
