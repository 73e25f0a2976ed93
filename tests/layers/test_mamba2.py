"""The Mamba-2 layer against its equations, written out one token and one head at a time."""

import pytest
import torch
from torch import Tensor

from m2rnn.layers import Mamba2
from tests.layers.equations import assert_layer_is, convolve, rms_norm, silu

HEADS, STATE, INNER, HIDDEN = 3, 5, 12, 8
HEAD = INNER // HEADS
OPTIONS = [
    {},
    {"conv_bias": False},
    {"conv_size": None},
    {"conv_size": 3, "activation": None},
    {"conv_size": None, "activation": None, "norm": False, "residual": False, "gate": False},
    {"norm_before_gate": True},
]


def straight_line(layer: Mamba2, x: Tensor, options: dict) -> Tensor:
    """The layer's equations for one sequence ``x`` [T, hidden], in the order in which they are stated."""
    p = dict(layer.named_parameters())
    wide = INNER + 2 * STATE
    xBC, logits, g = (x @ p["in_proj.weight"].T).tensor_split([wide, wide + HEADS], 1)
    if "conv.weight" in p:
        xBC = convolve(xBC, p["conv.weight"], p.get("conv.bias", 0.0))
    if options.get("activation", "silu") == "silu":
        xBC = silu(xBC)
    rows = []
    states = [torch.zeros(HEAD, STATE, dtype=x.dtype)] * HEADS
    for t in range(len(x)):
        row = []
        B, C = xBC[t, INNER:].chunk(2)
        for n in range(HEADS):
            u = xBC[t, n * HEAD :][:HEAD]
            dt = torch.log(1 + torch.exp(logits[t, n] + p["decay_gate.dt_bias"][n]))
            A = -torch.exp(p["decay_gate.A_log"][n])
            states[n] = torch.exp(dt * A) * states[n] + dt * torch.outer(u, B)
            y = states[n] @ C
            row.append(y + p["D"][n] * u if options.get("residual", True) else y)
        y = torch.cat(row)
        if options.get("norm_before_gate"):
            y = rms_norm(y, p["norm.weight"]) * silu(g[t])
        else:
            y = y * silu(g[t]) if options.get("gate", True) else y
            y = rms_norm(y, p["norm.weight"]) if options.get("norm", True) else y
        rows.append(p["out_proj.weight"] @ y)
    return torch.stack(rows)


@pytest.mark.parametrize("options", OPTIONS)
def test_layer_is_its_equations(options: dict) -> None:
    layer = Mamba2(HIDDEN, HEADS, STATE, INNER, **options)
    assert_layer_is(layer, lambda x: straight_line(layer, x, options), HIDDEN)


def test_start() -> None:
    layer = Mamba2(64)
    assert (layer.num_heads, layer.head_dim) == (2, 64)
    assert torch.equal(layer.D, torch.ones(2))
    assert torch.equal(layer.conv.bias, torch.zeros(128 + 2 * 128))
    assert Mamba2(64, conv_bias=False).conv.bias is None


@pytest.mark.parametrize(
    ("hidden", "heads", "state", "inner", "parameters"),
    [(1024, 64, 216, 1216, 4_253_104), (1536, 32, 192, 2048, 10_090_464)],
)
def test_parameter_counts_are_those_of_the_published_models(
    hidden: int, heads: int, state: int, inner: int, parameters: int
) -> None:
    """What a layer of the published 410M model and 7B hybrid has: their totals less all else, by number of layers.

    By hand: in projection h (2 inner + 2 state + H), convolution and bias 5 (inner + 2 state), A, dt and D 3 H, norm
    and out projection inner (1 + h).
    """
    with torch.device("meta"):
        layer = Mamba2(hidden, heads, state, inner)
    assert sum(parameter.numel() for parameter in layer.parameters()) == parameters
    assert parameters == (
        hidden * (2 * inner + 2 * state + heads) + 5 * (inner + 2 * state) + 3 * heads + inner * (1 + hidden)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, r"num_heads must divide inner_size \(64\), got 3"),
        ({"state_size": 0}, "state_size must be at least 1, got 0"),
        ({"inner_size": "64"}, "inner_size must be a whole number, got '64'"),
        ({"inner_size": -64}, "inner_size must be at least 1, got -64"),
        ({"activation": "relu"}, "activation must be 'silu' or None, got 'relu'"),
        ({"conv_init": float("nan")}, "conv_init must be a positive number, .* got nan"),
        ({"norm_before_gate": True, "norm": False}, "orders the norm and the gate, but norm=False: leave"),
        ({"norm_before_gate": True, "gate": False}, "orders the norm and the gate, but gate=False: leave"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba2(32, **options)
