"""Named configurations: the paper's models at 410M and 7B, tiny twins of them, and models for state tracking.

A pattern is a string with one letter a layer: M m2rnn, A attention, G gated_deltanet, S mamba2, U gru, R rnn. A model
of the paper is a pattern and a size, so a new hybrid is one line: ``from_pattern("MSSSASSS" * 3, "410m")``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from m2rnn.layers.m2rnn import STATE_TRACKING
from m2rnn.models.config import M2RNNConfig

LETTERS = {"m2rnn": "M", "attention": "A", "gated_deltanet": "G", "mamba2": "S", "gru": "U", "rnn": "R"}


def _paper_patterns(repeats: int) -> dict[str, str]:
    """The paper's models of eight layers times ``repeats``; in hybrids the fifth of each eight is attention."""
    return {
        "m2rnn": "MMMMMMMM" * repeats,
        "gdn": "GGGGGGGG" * repeats,
        "mamba2": "SSSSSSSS" * repeats,
        "transformer": "AAAAAAAA" * repeats,
        "gru": "UUUUUUUU" * repeats,
        "rnn": "RRRRRRRR" * repeats,
        "hybrid-m2rnn": "MMMMAMMM" * repeats,
        "hybrid-gdn": "GGGGAGGG" * repeats,
        "hybrid-mamba2": "SSSSASSS" * repeats,
        "hybrid-gdn-m2rnn1": "MGGGAGGG" + "GGGGAGGG" * (repeats - 1),
        "hybrid-mamba2-m2rnn1": "MSSSASSS" + "SSSSASSS" * (repeats - 1),
        f"hybrid-gdn-m2rnn{repeats}": "GGGMAGGG" * repeats,
        f"hybrid-mamba2-m2rnn{repeats}": "SSSMASSS" * repeats,
    }


_TINY_PATTERNS = {
    "m2rnn": "MM",
    "gdn": "GG",
    "mamba2": "SS",
    "transformer": "AA",
    "gru": "UU",
    "rnn": "RR",
    "hybrid-m2rnn": "MMAM",
    "hybrid-gdn": "GGAG",
    "hybrid-mamba2": "SSAS",
    "hybrid-gdn-m2rnn1": "MGAG",
    "hybrid-mamba2-m2rnn1": "MSAS",
    "hybrid-gdn-m2rnn2": "GMAGMAG",
    "hybrid-mamba2-m2rnn2": "SMASMAS",
}

_PAPER = {"vocab_size": 100_352, "pad_token_id": 100_256, "bos_token_id": 100_257, "eos_token_id": 100_257}
_TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "mixer_options": {
        "m2rnn": {"num_heads": 6, "key_dim": 16, "value_dim": 16},
        "attention": {"num_heads": 4},
        "gated_deltanet": {"num_heads": 2, "key_dim": 16, "value_dim": 32},
        "mamba2": {"num_heads": 4, "state_size": 24, "inner_size": 96},
        "gru": {"num_heads": 6, "head_dim": 16},
        "rnn": {"num_heads": 6, "head_dim": 16},
    },
}
_SIZES: dict[str, dict[str, Any]] = {
    "410m": {
        **_PAPER,
        "hidden_size": 1024,
        "mlp_options": {"swiglu": {"intermediate_size": 2752}},
        "mixer_options": {
            "m2rnn": {"num_heads": 84, "key_dim": 64, "value_dim": 16},
            "attention": {"num_heads": 16},
            "gated_deltanet": {"num_heads": 2, "key_dim": 256, "value_dim": 512},
            "mamba2": {"num_heads": 64, "state_size": 216, "inner_size": 1216},
            "gru": {"num_heads": 85, "head_dim": 16},
            "rnn": {"num_heads": 85, "head_dim": 16},
        },
    },
    "7b": {
        **_PAPER,
        "hidden_size": 1536,
        "mlp_options": {
            "moe": {
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "intermediate_size": 256,
                "shared_intermediate_size": 1024,
            }
        },
        "mixer_options": {
            "m2rnn": {"num_heads": 132, "key_dim": 64, "value_dim": 16},
            "attention": {"num_heads": 24},
            "gated_deltanet": {"num_heads": 3, "key_dim": 256, "value_dim": 512},
            "mamba2": {"num_heads": 32, "state_size": 192, "inner_size": 2048},
            "gru": {"num_heads": 128, "head_dim": 16},
            "rnn": {"num_heads": 128, "head_dim": 16},
        },
    },
    "tiny": {**_TINY, "mlp_options": {"swiglu": {"intermediate_size": 192}}},
    "tiny-moe": {
        **_TINY,
        "mlp_options": {
            "moe": {
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "intermediate_size": 32,
                "shared_intermediate_size": 64,
            }
        },
    },
}

# For word problems: no convolution, no SiLU, and a state that changes with every token from the start
_PLAIN = {"conv_size": None, "activation": None}
_DELTA = {"num_heads": 4, "key_dim": 16, "value_dim": 32, **_PLAIN}


def _mlp(width: int) -> dict[str, Any]:
    return {"hidden_size": 64, "mlp_options": {"swiglu": {"intermediate_size": width}}}


_STATE_TRACKING: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # pattern, fields, options of the mixer
    "m2rnn": (
        "M",
        {"hidden_size": 60, "mlps": ["none"]},
        {"num_heads": 8, "num_q_heads": 8, "num_k_heads": 8, **STATE_TRACKING},
    ),
    "gru": ("U", _mlp(128), {"num_heads": 3, "head_dim": 32, "gate": False, "weight_std": None, **_PLAIN}),
    "rnn": ("R", _mlp(128), {"num_heads": 4, "head_dim": 48, "gate": False, "weight_std": None, **_PLAIN}),
    "gated_deltanet": ("G", _mlp(128), _DELTA),
    "gated_deltanet_negative": ("G", _mlp(128), {**_DELTA, "negative_eigenvalues": True}),
    "gated_deltaproduct2": (
        "G",
        _mlp(124),
        {**_DELTA, "num_heads": 3, "num_householder": 2, "negative_eigenvalues": True},
    ),
    "mamba2": ("S", _mlp(128), {"num_heads": 4, "state_size": 64, "inner_size": 128, **_PLAIN}),
    "attention": ("AA", _mlp(64), {"num_heads": 4, "rope_theta": 10000.0}),
}


def layers(pattern: str) -> list[str]:
    """The mixer names of a pattern: ``layers("MMA")`` is ``["m2rnn", "m2rnn", "attention"]``.

    Raises:
        ValueError: for a letter that names no mixer.
    """
    mixers = {letter: mixer for mixer, letter in LETTERS.items()}
    for letter in pattern:
        if letter not in mixers:
            known = ", ".join(f"{letter} {mixer}" for letter, mixer in mixers.items())
            raise ValueError(f"unknown letter {letter!r} in pattern {pattern!r}; known: {known}")
    return [mixers[letter] for letter in pattern]


def pattern_of(config: M2RNNConfig) -> str:
    """The pattern of a configuration's mixers, what ``layers`` takes."""
    return "".join(LETTERS[mixer] for mixer in config.mixers)


def from_pattern(pattern: str, size: str = "410m", **overrides: Any) -> M2RNNConfig:
    """A model with these mixers, in the sizes of the paper: attention has rotary positions only where all is attention.

    Args:
        pattern: one letter a layer, of any length.
        size: ``"410m"`` or ``"7b"``, with an MLP or mixture of experts in every layer as in the paper; ``"tiny"`` and
            ``"tiny-moe"`` are as small as runs well on a laptop.
        **overrides: fields of ``M2RNNConfig``; ``mixer_options`` and ``mlp_options`` change the named options only.

    Raises:
        ValueError: for an unknown letter or size.
    """
    if size not in _SIZES:
        raise ValueError(f"unknown size {size!r}; known: {', '.join(_SIZES)}")
    mixers = layers(pattern)
    fields = _SIZES[size]
    options = {mixer: fields["mixer_options"][mixer] for mixer in dict.fromkeys(mixers)}
    if set(mixers) == {"attention"}:
        options["attention"] = options["attention"] | {"rope_theta": 10000.0}
    (mlp,) = fields["mlp_options"]
    return _config({**fields, "mixers": mixers, "mlps": [mlp] * len(mixers), "mixer_options": options}, overrides)


def state_tracking(mixer: str = "m2rnn", vocab_size: int = 6, **overrides: Any) -> M2RNNConfig:
    """A model of 59,000 parameters, within two percent, for word problems of groups, such as S3.

    The M2RNN layer differs from the language-model one: no convolution and no SiLU on q, k, v, a random W
    instead of the identity, more value channels (V = 32) and fewer rows (K = 4), as many q and k heads as others, and a
    forget gate that starts fast (A in [4, 16], dt in [0.3, 1]): the state must change with every token from the start.
    There is no MLP, which could multiply two elements by itself and leads away from a state.
    The embedding starts at unit variance for every mixer: at 0.02 Adam's first steps overwrite it.

    The others, in the same budget with an MLP, have no convolution and SiLU either. The GRU has three heads of 32
    units, the RNN four of 48, both without output gate and with W from N(0, 1/V); Gated DeltaNet four heads of 16 ×
    32, Gated DeltaProduct three; Mamba-2 four of 64 × 32; the Transformer spends its parameters on two layers,
    since one attention layer cannot compose, with the rotary positions of the paper's Transformer.

    Args:
        mixer: ``"m2rnn"``, ``"gru"``, ``"rnn"``, ``"gated_deltanet"`` (eigenvalues in [0, 1]),
            ``"gated_deltanet_negative"`` (in [-1, 1]), ``"gated_deltaproduct2"`` (in [-1, 1], two Householder
            factors), ``"mamba2"`` or ``"attention"``.
        vocab_size: number of group elements, inputs and outputs alike.
        **overrides: fields of ``M2RNNConfig``; ``mixer_options`` and ``mlp_options`` change the named
            options only.

    Raises:
        ValueError: for a mixer that has no such model.
    """
    if mixer not in _STATE_TRACKING:
        known = ", ".join(map(repr, _STATE_TRACKING))
        raise ValueError(f"no state-tracking model for mixer {mixer!r}; there are {known}")
    pattern, fields, options = _STATE_TRACKING[mixer]
    mixers = layers(pattern)
    common = {
        "vocab_size": vocab_size,
        "embedding_range": 1.0,
        "mixers": mixers,
        "mixer_options": {mixers[0]: options},
    }
    mlps = fields.get("mlps", ["swiglu"]) * len(overrides.get("mixers", mixers))
    return _config({"mlp_options": {}, **common, **fields, "mlps": mlps}, overrides)


def _config(fields: dict[str, Any], overrides: dict[str, Any]) -> M2RNNConfig:
    """``fields`` with ``overrides``, which reach into single options of a layer."""
    for name in overrides:
        if name not in M2RNNConfig.__annotations__ and not hasattr(M2RNNConfig, name):
            own = ", ".join(M2RNNConfig.__annotations__)
            raise ValueError(f"unknown field {name!r} of M2RNNConfig; its own: {own}")
    merged = {**fields, **overrides}
    for field in ("mixer_options", "mlp_options"):
        names = [*fields[field], *overrides.get(field, {})]
        merged[field] = {
            name: {**fields[field].get(name, {}), **overrides.get(field, {}).get(name, {})} for name in names
        }
    return M2RNNConfig(**merged)


_PRESETS: dict[str, Callable[..., M2RNNConfig]] = {
    **{f"{kind}-410m": partial(from_pattern, pattern, "410m") for kind, pattern in _paper_patterns(3).items()},
    **{f"{kind}-7b": partial(from_pattern, pattern, "7b") for kind, pattern in _paper_patterns(5).items()},
    **{f"tiny-{kind}": partial(from_pattern, pattern, "tiny") for kind, pattern in _TINY_PATTERNS.items()},
    **{f"tiny-moe-{kind}": partial(from_pattern, pattern, "tiny-moe") for kind, pattern in _TINY_PATTERNS.items()},
    "state-tracking": state_tracking,
    **{f"state-tracking-{mixer}": partial(state_tracking, mixer) for mixer in list(_STATE_TRACKING)[1:]},
}


def names() -> list[str]:
    """The names that ``get`` takes."""
    return list(_PRESETS)


def get(name: str, **overrides: Any) -> M2RNNConfig:
    """The configuration of this name, with ``overrides`` of its fields.

    ``mixer_options`` and ``mlp_options`` change the named options only.

    Raises:
        ValueError: for an unknown name or field, listing the known ones.
    """
    if name not in _PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(_PRESETS)}")
    return _PRESETS[name](**overrides)
