"""Named configurations. A pattern is a string, one letter a layer: M m2rnn, A attention, G gru, R rnn."""

from collections.abc import Callable
from typing import Any

from m2rnn.models.config import M2RNNConfig

_LETTERS = {"M": "m2rnn", "A": "attention", "G": "gru", "R": "rnn"}
_PLAIN_RNN: dict[str, Any] = {"conv_size": None, "activation": None, "gate": False, "weight_std": None}


def layers(pattern: str) -> list[str]:
    """The mixer names of a pattern: ``layers("MMA")`` is ``["m2rnn", "m2rnn", "attention"]``."""
    return [_LETTERS[letter] for letter in pattern]


def state_tracking(mixer: str = "m2rnn", vocab_size: int = 6, **overrides: Any) -> M2RNNConfig:
    """A model of about 60,000 parameters for word problems of groups, such as S3.

    The M2RNN layer differs from the language-model one: no convolution and no SiLU on q, k, v, a random W
    instead of the identity, more value channels (V = 32), as many q and k heads as others, and a forget gate
    that starts fast (A in [4, 16], dt in [0.3, 1]): the state must change with every token from the start.
    The embedding starts at unit variance for every mixer: at 0.02 Adam's first steps overwrite it.

    The others get the same number of parameters within two percent: a GRU with three heads of 32 units and
    an RNN with four of 48, both without convolution, SiLU and output gate and with W from N(0, 1/V), and a
    Transformer that spends them on two layers, since one attention layer cannot compose, with the rotary
    positions of the paper's Transformer.

    Args:
        mixer: ``"m2rnn"``, ``"gru"``, ``"rnn"`` or ``"attention"``.
        vocab_size: number of group elements, inputs and outputs alike.
        **overrides: fields of ``M2RNNConfig``; ``mixer_options`` and ``mlp_options`` change the named
            options only.

    Raises:
        ValueError: for a mixer that has no such model.
    """
    match mixer:
        case "m2rnn":
            pattern, intermediate_size = "M", 128
            options: dict[str, Any] = {
                "num_heads": 4,
                "num_q_heads": 4,
                "num_k_heads": 4,
                "key_dim": 8,
                "value_dim": 32,
                "conv_size": None,
                "activation": None,
                "weight_init": "normal",
                "A_range": [4.0, 16.0],
                "dt_range": [0.3, 1.0],
            }
        case "gru":
            pattern, intermediate_size = "G", 128
            options = {"num_heads": 3, "head_dim": 32, **_PLAIN_RNN}
        case "rnn":
            pattern, intermediate_size = "R", 128
            options = {"num_heads": 4, "head_dim": 48, **_PLAIN_RNN}
        case "attention":
            pattern, intermediate_size = "AA", 64
            options = {"num_heads": 4, "rope_theta": 10000.0}
        case _:
            known = "'m2rnn', 'gru', 'rnn', 'attention'"
            raise ValueError(f"no state-tracking model for mixer {mixer!r}; there are {known}")
    return _config(
        pattern,
        {
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "embedding_range": 1.0,
            "mixer_options": {mixer: options},
            "mlp_options": {"swiglu": {"intermediate_size": intermediate_size}},
        },
        overrides,
    )


def _tiny(pattern: str, rope_theta: float | None = None, **overrides: Any) -> M2RNNConfig:
    fields = {
        "vocab_size": 512,
        "hidden_size": 64,
        "mixer_options": {
            "m2rnn": {"num_heads": 6, "key_dim": 16, "value_dim": 16},
            "attention": {"num_heads": 4, "rope_theta": rope_theta},
        },
        "mlp_options": {"swiglu": {"intermediate_size": 192}},
    }
    return _config(pattern, fields, overrides)


def _config(pattern: str, fields: dict[str, Any], overrides: dict[str, Any]) -> M2RNNConfig:
    """``fields`` with ``overrides``, which reach into single options of a layer."""
    merged = {"mixers": layers(pattern), **fields, **overrides}
    for field in ("mixer_options", "mlp_options"):
        merged[field] = fields[field] | {
            name: fields[field].get(name, {}) | options for name, options in overrides.get(field, {}).items()
        }
    return M2RNNConfig(**merged)


_PRESETS: dict[str, Callable[..., M2RNNConfig]] = {
    "state-tracking": state_tracking,
    "tiny-m2rnn": lambda **overrides: _tiny("MMMM", **overrides),
    "tiny-hybrid": lambda **overrides: _tiny("MMAM", **overrides),
    "tiny-attention": lambda **overrides: _tiny("AAAA", rope_theta=10000.0, **overrides),
}


def names() -> list[str]:
    """The names that ``get`` takes."""
    return list(_PRESETS)


def get(name: str, **overrides: Any) -> M2RNNConfig:
    """The configuration of this name, with ``overrides`` of its fields.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in _PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(_PRESETS)}")
    return _PRESETS[name](**overrides)
