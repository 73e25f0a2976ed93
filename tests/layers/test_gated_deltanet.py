"""The Gated DeltaNet layer against its equations, written out one token and one head at a time."""

import math

import pytest
import torch
from torch import Tensor

from m2rnn.layers import GatedDeltaNet
from tests.layers.equations import assert_layer_is, convolve, rms_norm, sigmoid, silu

HEADS, KEY, VALUE, HIDDEN = 2, 3, 5, 8
OPTIONS = [
    {},
    {"negative_eigenvalues": True},
    {"num_householder": 2, "negative_eigenvalues": True},
    {"num_householder": 3},
    {"conv_size": None},
    {"conv_size": 3, "activation": None},
    {"conv_size": None, "activation": None, "norm": False, "gate": False},
    {"norm_before_gate": True},
]


def straight_line(layer: GatedDeltaNet, x: Tensor, options: dict) -> Tensor:
    """The layer's equations for one sequence ``x`` [T, hidden], in the order in which they are stated."""
    p = dict(layer.named_parameters())
    writes = options.get("num_householder", 1)
    wide = HEADS * KEY + writes * HEADS * (KEY + VALUE)
    qkv, logits, beta_logits, g = (x @ p["in_proj.weight"].T).tensor_split(
        [wide, wide + HEADS, wide + HEADS * (1 + writes)], 1
    )
    if "conv.weight" in p:
        qkv = convolve(qkv, p["conv.weight"])
    if options.get("activation", "silu") == "silu":
        qkv = silu(qkv)
    rows = []
    states = [torch.zeros(KEY, VALUE, dtype=x.dtype)] * HEADS
    for t in range(len(x)):
        row = []
        for n in range(HEADS):
            q = qkv[t, n * KEY :][:KEY]
            q = q / torch.sqrt(q @ q + 1e-6) / math.sqrt(KEY)
            dt = torch.log(1 + torch.exp(logits[t, n] + p["decay_gate.dt_bias"][n]))
            S = torch.exp(-torch.exp(p["decay_gate.A_log"][n]) * dt) * states[n]
            for j in range(writes):
                k = qkv[t, (HEADS + j * HEADS + n) * KEY :][:KEY]
                k = k / torch.sqrt(k @ k + 1e-6)
                v = qkv[t, (1 + writes) * HEADS * KEY + (j * HEADS + n) * VALUE :][:VALUE]
                beta = sigmoid(beta_logits[t, j * HEADS + n])
                if options.get("negative_eigenvalues"):
                    beta = 2 * beta
                S = S - beta * torch.outer(k, k) @ S + beta * torch.outer(k, v)
            states[n] = S
            y = S.T @ q
            if options.get("norm_before_gate"):
                row.append(rms_norm(y, p["norm.weight"]) * silu(g[t, n * VALUE :][:VALUE]))
                continue
            if options.get("gate", True):
                y = y * silu(g[t, n * VALUE :][:VALUE])
            row.append(rms_norm(y, p["norm.weight"]) if options.get("norm", True) else y)
        rows.append(p["out_proj.weight"] @ torch.cat(row))
    return torch.stack(rows)


@pytest.mark.parametrize("options", OPTIONS)
def test_layer_is_its_equations(options: dict) -> None:
    layer = GatedDeltaNet(HIDDEN, HEADS, KEY, VALUE, **options)
    assert_layer_is(layer, lambda x: straight_line(layer, x, options), HIDDEN)


@pytest.mark.parametrize(("negative", "lowest"), [(False, 0.0), (True, -1.0)])
def test_eigenvalues_of_the_transition(negative: bool, lowest: float) -> None:
    """With β at its largest, reading along k forgets what was there, or turns it around."""
    layer = GatedDeltaNet(
        4,
        1,
        key_dim=3,
        value_dim=3,
        negative_eigenvalues=negative,
        conv_size=None,
        activation=None,
        A_range=(1e-4, 1e-4),
    ).double()
    with torch.no_grad():
        layer.in_proj.weight.zero_()
        layer.in_proj.weight[3, 0] = 1  # k is the first axis
        layer.in_proj.weight[10, 0] = 100  # β logit
        layer.decay_gate.dt_bias.fill_(-100)
    _, state = layer(torch.zeros(1, 2, 4, dtype=torch.float64))
    state = state._replace(recurrent=torch.eye(3, dtype=torch.float64)[None, None])
    _, state = layer(torch.tensor([[[1.0, 0, 0, 0]]], dtype=torch.float64), state)
    expected = torch.diag(torch.tensor([lowest, 1.0, 1.0]))
    assert torch.allclose(state.recurrent[0, 0], expected.double(), atol=1e-5)


@pytest.mark.parametrize(("hidden", "heads", "parameters"), [(1024, 2, 4_207_108), (1536, 3, 9_459_206)])
def test_parameter_counts_are_those_of_the_published_models(hidden: int, heads: int, parameters: int) -> None:
    """What a layer of the published 410M and 7B hybrids has: their totals less all other layers', by number of layers.

    By hand: in projection h (2 H K + 2 H V + 2 H), convolution 4 (2 H K + H V), gate 2 H, norm V, out projection H V h.
    """
    with torch.device("meta"):
        layer = GatedDeltaNet(hidden)
    assert layer.num_heads == heads
    assert sum(parameter.numel() for parameter in layer.parameters()) == parameters
    K, V = 256, 512
    by_hand = hidden * heads * (2 * K + 2 * V + 2) + 4 * heads * (2 * K + V) + 2 * heads + V + heads * V * hidden
    assert by_hand == parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"key_dim": 0}, "key_dim must be at least 1, got 0"),
        ({"value_dim": 0}, "value_dim must be at least 1, got 0"),
        ({"num_householder": 0}, "num_householder must be at least 1, got 0"),
        ({"activation": "relu"}, "activation must be 'silu' or None, got 'relu'"),
        ({"conv_init": -0.02}, "conv_init must be a positive number, .* got -0.02"),
        ({"norm_before_gate": True, "norm": False}, "orders the norm and the gate, but norm=False: leave"),
        ({"norm_before_gate": True, "gate": False}, "orders the norm and the gate, but gate=False: leave"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GatedDeltaNet(32, **options)
