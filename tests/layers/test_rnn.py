"""The RNN and GRU layers against their equations, one token and one head at a time, and the paper's sizes."""

import pytest
import torch
from torch import Tensor, nn

from m2rnn.layers import GRU, RNN, SwiGLU
from tests.layers.equations import assert_layer_is, convolve, rms_norm, sigmoid, silu

LAYERS = {"rnn": RNN, "gru": GRU}
HEADS, UNITS, HIDDEN = 3, 4, 8
OPTIONS = [
    {},
    {"conv_size": None},
    {"conv_size": 3, "activation": None},
    {"conv_size": None, "activation": None, "norm": False, "gate": False},
    {"norm": False},
]


def straight_line(layer: RNN, x: Tensor, options: dict) -> Tensor:
    """The layer's equations for one sequence ``x`` [T, hidden], in the order in which they are stated."""
    p = dict(layer.named_parameters())
    gates = 2 if isinstance(layer, GRU) else 0
    parts = (x @ p["in_proj.weight"].T).unflatten(1, (-1, HEADS * UNITS)).unbind(1)
    inputs = parts[0]
    if "conv.weight" in p:
        inputs = convolve(inputs, p["conv.weight"])
    if options.get("activation", "silu") == "silu":
        inputs = silu(inputs)
    weights = p["state_weight"].unflatten(0, (1 + gates, HEADS))
    states = [torch.zeros(UNITS, dtype=x.dtype)] * HEADS
    rows = []
    for t in range(len(x)):
        for n in range(HEADS):
            here = slice(n * UNITS, (n + 1) * UNITS)
            h = states[n]
            if gates:
                f = sigmoid(weights[1, n].T @ h + parts[1][t, here])
                r = sigmoid(weights[2, n].T @ h + parts[2][t, here])
                z = torch.tanh(weights[0, n].T @ (r * h) + inputs[t, here])
                states[n] = f * h + (1 - f) * z
            else:
                states[n] = torch.tanh(weights[0, n].T @ h + inputs[t, here])
        y = torch.cat(states)
        if options.get("gate", True):
            y = y * silu(parts[-1][t])
        if options.get("norm", True):
            y = rms_norm(y, p["norm.weight"])
        rows.append(p["out_proj.weight"] @ y)
    return torch.stack(rows)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_its_equations(name: str, options: dict) -> None:
    layer = LAYERS[name](HIDDEN, HEADS, UNITS, state_clip=None, **options)
    assert_layer_is(layer, lambda x: straight_line(layer, x, options), HIDDEN)


@pytest.mark.parametrize("name", LAYERS)
def test_state_clip_bounds_what_flows_back_through_the_state(name: str) -> None:
    x = torch.randn(1, 12, HIDDEN, dtype=torch.float64)
    gradients = {}
    for clip in (None, 1e3, 1e-3):
        torch.manual_seed(0)
        layer = LAYERS[name](HIDDEN, 2, UNITS, state_clip=clip, weight_std=None).double()
        layer(x)[0].square().sum().backward()
        gradients[clip] = layer.state_weight.grad
    assert torch.equal(gradients[None], gradients[1e3])
    assert not torch.allclose(gradients[1e-3], gradients[None], rtol=1e-2)


def paper_model_size(mixer: nn.Module) -> int:
    """Parameters of the 410M model with this mixer in all 24 layers: SwiGLU 2752, RMSNorms, untied 100,352 tokens."""
    block = sum(p.numel() for p in [*mixer.parameters(), *SwiGLU(1024, 2752).parameters()]) + 2 * 1024
    return 24 * block + 1024 + 2 * 100_352 * 1024


@pytest.mark.parametrize(("name", "published"), [("gru", 577_317_248), ("rnn", 509_426_048)])
def test_sizes_of_the_paper(name: str, published: int) -> None:
    """The published totals leave 4,206,480 numbers to an RNN layer and 7,035,280 to a GRU layer, in 1360 units.

    RNN: 3 · 1024 · 1360 for x and g in and y out, 85 · 16² for W, and 5 · 1360 that remain: the taps of a convolution
    of width 4 over x and the scale of an RMSNorm, so there is no residual D and no bias. The GRU's 2,828,800 more are
    2 · 1024 · 1360 + 2 · 85 · 16²: inputs and matrices of two gates, which do not pass the convolution.
    """
    with torch.device("meta"):
        mixer = LAYERS[name](1024, 85, 16)
        assert paper_model_size(mixer) == published
        units, gates = 85 * 16, 2 if name == "gru" else 0
        assert {key: p.numel() for key, p in mixer.named_parameters()} == {
            "in_proj.weight": 1024 * (2 + gates) * units,
            "conv.weight": 4 * units,
            "state_weight": (1 + gates) * 85 * 16**2,
            "norm.weight": units,
            "out_proj.weight": 1024 * units,
        }


@pytest.mark.parametrize("name", LAYERS)
def test_W_starts_as_asked(name: str) -> None:
    for options, std in (({}, 0.02), ({"weight_std": None}, 0.2), ({"weight_std": 0.5}, 0.5)):
        weight = LAYERS[name](32, 30, 25, **options).state_weight
        assert weight.std().item() == pytest.approx(std, rel=0.03)
        assert abs(weight.mean()) < 0.03 * std


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"conv_size": 2.5}, "width must be a whole number, got 2.5"),
        ({"activation": "relu"}, "activation must be 'silu' or None, got 'relu'"),
        ({"conv_size": 0}, "width must be at least 1, got 0"),
        ({"conv_init": float("inf")}, "conv_init must be a positive number, .* got inf"),
    ],
)
@pytest.mark.parametrize("name", LAYERS)
def test_bad_options_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAYERS[name](32, **options)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_static_state_keeps_its_place_and_a_dynamic_one_its_values(name: str) -> None:
    layer = LAYERS[name](HIDDEN, HEADS, UNITS, weight_std=None)
    first, *tokens = torch.randn(6, 2, 1, HIDDEN)
    _, state = layer(first)
    static = state.static(99)
    addresses = [x.data_ptr() for x in static]
    for token in tokens:
        before = [x.clone() for x in state]
        kept = state
        y, state = layer(token, state)
        y_static, static = layer(token, static)
        assert torch.equal(y, y_static)
        assert all(torch.equal(x, old) for x, old in zip(kept, before, strict=True))
        assert all(torch.equal(x, new) for x, new in zip(static, state, strict=True))
    assert [x.data_ptr() for x in static] == addresses
    dynamic = static.dynamic()
    layer(first, static)
    assert all(torch.equal(x, old) for x, old in zip(dynamic, state, strict=True))
