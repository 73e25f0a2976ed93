"""Small models of every kind, in float64 so that comparisons are tight."""

from typing import Any

import torch

from m2rnn.models import M2RNNConfig, M2RNNForCausalLM

VOCAB = 23
OPTIONS = {
    "m2rnn": {"num_heads": 2, "key_dim": 4, "value_dim": 4},
    "attention": {"num_heads": 4, "num_kv_heads": 2},
    "gru": {"num_heads": 2, "head_dim": 6},
    "rnn": {"num_heads": 3, "head_dim": 4, "conv_size": None},
    "gated_deltanet": {"num_heads": 2, "key_dim": 4, "value_dim": 6, "negative_eigenvalues": True},
    "mamba2": {"num_heads": 4, "state_size": 5},
}
MLP_OPTIONS = {
    "swiglu": {"intermediate_size": 24},
    "moe": {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 8, "shared_intermediate_size": 16},
}
CONFIGS = {
    "m2rnn": {"mixers": ["m2rnn", "m2rnn"]},
    "hybrid": {"mixers": ["m2rnn", "attention", "gru"], "mlps": ["swiglu", "none", "swiglu"]},
    "rnn": {"mixers": ["rnn", "gru"]},
    "linear": {"mixers": ["gated_deltanet", "mamba2"]},
    "moe": {"mixers": ["m2rnn", "attention"], "mlps": ["moe", "moe"]},
    "rope": {"mixers": ["attention", "attention"], "rope": 100.0},
    "window": {"mixers": ["attention", "m2rnn", "attention"], "rope": 100.0, "local": {"window": 3, "qk_norm": True}},
}


def config(name: str = "hybrid", **overrides: Any) -> M2RNNConfig:
    fields = dict(CONFIGS[name])
    rope, local = fields.pop("rope", None), fields.pop("local", {})
    options = {mixer: dict(OPTIONS[mixer]) for mixer in overrides.get("mixers", fields["mixers"])}
    if "attention" in options:
        options["attention"] |= {"rope_theta": rope} | local
    defaults = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "mixer_options": options,
        "mlp_options": MLP_OPTIONS,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return M2RNNConfig(**defaults | fields | overrides)


def make(name: str = "hybrid", dtype: torch.dtype = torch.float64, **overrides: Any) -> M2RNNForCausalLM:
    """An evaluation-mode model with the same weights on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return M2RNNForCausalLM(config(name, **overrides)).to(dtype).eval()
