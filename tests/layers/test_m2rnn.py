"""The M2RNN layer against its equations, written out one token and one head at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2rnn.layers import M2RNN
from tests.layers.equations import assert_layer_is, convolve, rms_norm, silu

HEADS, KEY, VALUE, HIDDEN = 4, 3, 5, 8
OPTIONS = [
    {},
    {
        "num_q_heads": 2,
        "num_k_heads": 4,
        "num_v_heads": 2,
        "num_f_heads": 1,
        "num_weight_heads": 2,
        "num_g_heads": 1,
    },
    {"conv_size": None},
    {"conv_size": 3, "activation": None},
    {"conv_size": None, "activation": None, "norm": False, "residual": False, "gate": False},
    {"gate": False},
    {"norm": False},
    {"norm_before_gate": True, "num_g_heads": 2},
]


def straight_line(layer: M2RNN, x: Tensor, options: dict) -> Tensor:
    """The layer's equations for one sequence ``x`` [T, hidden], in the order in which they are stated."""
    counts = {
        "q": options.get("num_q_heads", 1),
        "k": options.get("num_k_heads", 1),
        "v": options.get("num_v_heads", HEADS),
        "f": options.get("num_f_heads", HEADS),
        "w": options.get("num_weight_heads", HEADS),
        "g": options.get("num_g_heads", HEADS),
    }
    p = dict(layer.named_parameters())
    projected = x @ p["in_proj.weight"].T
    width_qk = (counts["q"] + counts["k"]) * KEY
    width_qkv = width_qk + counts["v"] * VALUE
    qkv, logits, g = projected.tensor_split([width_qkv, width_qkv + counts["f"]], 1)
    if "conv.weight" in p:
        qkv = convolve(qkv, p["conv.weight"])
    if options.get("activation", "silu") == "silu":
        qkv = silu(qkv)
    rows = []
    states = [torch.zeros(KEY, VALUE, dtype=x.dtype)] * HEADS
    for t in range(len(x)):
        row, gates = [], []
        for n in range(HEADS):

            def source(name: str, n: int = n) -> int:
                return n // (HEADS // counts[name])

            q = qkv[t, source("q") * KEY :][:KEY]
            k = qkv[t, (counts["q"] + source("k")) * KEY :][:KEY]
            v = qkv[t, width_qk + source("v") * VALUE :][:VALUE]
            h = source("f")
            dt = torch.log(1 + torch.exp(logits[t, h] + p["decay_gate.dt_bias"][h]))
            f = torch.exp(-torch.exp(p["decay_gate.A_log"][h]) * dt)
            Z = torch.tanh(states[n] @ p["state_weight"][source("w")] + torch.outer(k, v))
            states[n] = f * states[n] + (1 - f) * Z
            y = states[n].T @ q
            if options.get("residual", True):
                y = y + p["D"][n] * v
            row.append(y)
            if options.get("gate", True):
                gates.append(silu(g[t, source("g") * VALUE :][:VALUE]))
        y = torch.cat(row)
        if options.get("norm_before_gate"):
            y = rms_norm(y, p["norm.weight"]) * torch.cat(gates)
        else:
            y = y * torch.cat(gates) if gates else y
            y = rms_norm(y, p["norm.weight"]) if options.get("norm", True) else y
        rows.append(p["out_proj.weight"] @ y)
    return torch.stack(rows)


@pytest.mark.parametrize("options", OPTIONS)
def test_layer_is_its_equations(options: dict) -> None:
    layer = M2RNN(HIDDEN, HEADS, KEY, VALUE, state_clip=None, **options)
    assert_layer_is(layer, lambda x: straight_line(layer, x, options), HIDDEN)


def test_state_clip_bounds_what_flows_back_through_the_state() -> None:
    x = torch.randn(1, 12, HIDDEN, dtype=torch.float64)
    gradients = {}
    for clip in (None, 1e3, 1e-3):
        torch.manual_seed(0)
        layer = M2RNN(HIDDEN, 2, KEY, VALUE, state_clip=clip, dt_range=(1e-3, 1e-3)).double()
        y, _ = layer(x)
        y.square().sum().backward()
        gradients[clip] = layer.state_weight.grad
    assert torch.equal(gradients[None], gradients[1e3])
    assert gradients[1e-3].norm() < 0.5 * gradients[None].norm()


def test_default_options_are_the_language_model_layer() -> None:
    layer = M2RNN(64)
    x = torch.randn(2, 5, 64)
    y, state = layer(x)
    assert y.shape == x.shape
    assert state.recurrent.shape == (2, 4, 64, 16)
    assert state.conv.shape == (2, 3, 64 + 64 + 4 * 16)
    assert torch.equal(layer.state_weight, torch.eye(16).expand(4, 16, 16))
    assert torch.equal(layer.D, torch.ones(4, 16))


def test_normal_W_has_variance_one_over_V() -> None:
    layer = M2RNN(64, 100, 2, 25, weight_init="normal")
    assert layer.state_weight.std().item() == pytest.approx(math.sqrt(1 / 25), rel=0.03)
    assert abs(layer.state_weight.mean()) < 0.005


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 4, "num_q_heads": 3}, r"num_q_heads must divide the number of heads \(4\), got 3"),
        ({"num_heads": 4, "num_g_heads": 8}, r"num_g_heads must divide the number of heads \(4\), got 8"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_heads": 2.0}, "num_heads must be a whole number, got 2.0"),
        ({"num_q_heads": "1"}, "num_q_heads must be a whole number, got '1'"),
        ({"num_g_heads": 0}, "num_g_heads must be at least 1, got 0"),
        ({"A_range": 3}, r"A_range must be two numbers \(low, high\), got 3"),
        ({"dt_range": [0.1, 0.2, 0.3]}, r"dt_range must be two numbers \(low, high\), got \[0.1, 0.2, 0.3\]"),
        ({"key_dim": 0}, "key_dim must be at least 1, got 0"),
        ({"weight_init": "zero"}, "weight_init must be 'identity' or 'normal', got 'zero'"),
        ({"activation": "relu"}, "activation must be 'silu' or None, got 'relu'"),
        ({"conv_size": 0}, "width must be at least 1, got 0"),
        ({"conv_init": 0.0, "conv_size": None}, "conv_init must be a positive number, .* got 0.0"),
        ({"norm_before_gate": True, "norm": False}, "orders the norm and the gate, but norm=False: leave"),
        ({"norm_before_gate": True, "gate": False}, "orders the norm and the gate, but gate=False: leave"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        M2RNN(32, **options)


def test_the_layer_for_state_tracking_learns_parity_in_a_hundred_steps() -> None:
    """Which the layer for language models does not learn in 400."""
    embedding, layer, head = nn.Embedding(2, 64), M2RNN.for_state_tracking(64), nn.Linear(64, 2)
    parameters = [*embedding.parameters(), *layer.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)

    def logits(bits: Tensor) -> Tensor:
        result: Tensor = head(layer(embedding(bits))[0])
        return result

    for _ in range(100):
        bits = torch.randint(2, (32, 32))
        loss = F.cross_entropy(logits(bits).flatten(0, 1), (bits.cumsum(1) % 2).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bits = torch.randint(2, (64, 64))  # twice as long
    assert (logits(bits).argmax(-1) == bits.cumsum(1) % 2).double().mean() > 0.99


def test_the_options_for_state_tracking_can_be_changed() -> None:
    layer = M2RNN.for_state_tracking(60, 4, value_dim=16, num_k_heads=2, conv_size=4)
    assert (layer.num_heads, layer.num_q_heads, layer.num_k_heads, layer.value_dim) == (4, 4, 2, 16)
    assert layer.conv is not None
