"""Models of a plan that are as small as they get."""

SHAPES = {
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "reference": "transformer",
        "mixer_options": {"m2rnn": {"num_heads": 2, "key_dim": 8, "value_dim": 8}, "attention": {"num_heads": 2}},
    }
}
MODELS = {
    "transformer": {"shape": "tiny", "pattern": "AA"},
    "hybrid": {"shape": "tiny", "pattern": "MA"},
    "bounded": {"like": "hybrid", "tuned_as": "hybrid", "mixer_options": {"m2rnn": {"state_weight_bound": 0.9}}},
}
