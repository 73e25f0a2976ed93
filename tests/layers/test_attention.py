"""Attention against softmax written out, and what its state can do."""

import math

import pytest
import torch

from m2rnn.layers import Attention, Packing
from tests.tolerances import assert_close


def straight_line(layer: Attention, x: torch.Tensor) -> torch.Tensor:
    """One sequence ``x`` [T, hidden], one query and one head at a time."""
    heads, kv_heads, dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
    projected = x @ layer.in_proj.weight.T
    q, k, v = (
        part.unflatten(1, (-1, dim)) for part in projected.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    )
    if layer.rope_theta is not None:
        angles = [[t * layer.rope_theta ** (-2 * i / dim) for i in range(dim // 2)] for t in range(len(x))]
        turn = torch.exp(1j * torch.tensor(angles, dtype=torch.float64))[:, None]
        q, k = (
            (lambda z: torch.cat([z.real, z.imag], -1))(torch.complex(a[..., : dim // 2], a[..., dim // 2 :]) * turn)
            for a in (q, k)
        )
    rows = []
    for t in range(len(x)):
        row = []
        for n in range(heads):
            m = n // (heads // kv_heads)
            weight = torch.exp(k[: t + 1, m] @ q[t, n] / math.sqrt(dim))
            row.append(weight @ v[: t + 1, m] / weight.sum())
        rows.append(layer.out_proj.weight @ torch.cat(row))
    return torch.stack(rows)


@pytest.mark.parametrize("rope_theta", [None, 50.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_its_equation(kv_heads: int, rope_theta: float | None) -> None:
    layer = Attention(12, 4, kv_heads, head_dim=6, rope_theta=rope_theta).double()
    x = 3 * torch.randn(7, 12, dtype=torch.float64)
    assert_close(layer(x[None])[0][0], straight_line(layer, x), torch.float64, "output")


def test_given_positions_replace_the_count() -> None:
    layer = Attention(8, 2, rope_theta=10.0).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = layer(x)[0]
    shifted = layer(x, position_ids=torch.arange(5)[None] + 7)[0]  # only differences of positions matter
    assert_close(shifted, expected, torch.float64, "output")
    stretched = layer(x, position_ids=torch.arange(5)[None] * 2)[0]
    assert (stretched - expected).norm() > 1e-3


def test_crop_forgets_the_last_tokens_of_each_sequence() -> None:
    layer = Attention(8, 2, rope_theta=10.0).double()
    lengths = [6, 3, 4]
    packing = Packing.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0), sum(lengths))
    x = torch.randn(1, sum(lengths), 8, dtype=torch.float64)
    _, state = layer(x, packing=packing)
    following = torch.randn(3, 2, 8, dtype=torch.float64)
    y, _ = layer(following, state.crop(2))
    for n, part in enumerate(x.split(lengths, 1)):
        expected, _ = layer(following[n : n + 1], layer(part[:, :-2])[1])
        assert_close(y[n : n + 1], expected, torch.float64, "output")
        dense, _ = layer(following[n : n + 1], layer(part)[1].crop(2))
        assert_close(dense, expected, torch.float64, "output")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, r"num_kv_heads \(3\) must divide num_heads \(4\)"),
        ({"num_heads": 5}, r"num_heads \(5\) must divide hidden_size \(12\)"),
        ({"num_heads": 4, "rope_theta": 100.0}, r"head_dim \(3\) even"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(12, **options)
