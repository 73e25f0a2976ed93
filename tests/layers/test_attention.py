"""Attention against softmax written out, and what its state can do."""

import inspect
import math

import pytest
import torch
from torch.nn.attention import varlen

from m2rnn.layers import Attention, Packing, attention
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_positions_are_not_rounded_to_16_bits(dtype: torch.dtype) -> None:
    x, positions = torch.randn(1, 3, 2, 8).to(dtype), torch.tensor([[257, 2049, 4099]])  # none of which bfloat16 has
    rotated = attention.rotate(x, positions, 10000.0)
    assert_close(rotated, attention.rotate(x.double(), positions, 10000.0), dtype, "output")


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


@pytest.fixture
def packed_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Torch's attention over packed sequences as its documentation says, on the CPU; the options of its calls."""
    calls = []

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        calls.append({"max": (max_q, max_k), "window": window_size, "gqa": enable_gqa})
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert max_q == max_k == cu_seq_q.diff().max()
        assert all(x.stride(-1) == 1 and x.dim() == 3 for x in (q, k, v))
        parts = [x.split(cu_seq_q.diff().tolist()) for x in (q, k, v)]
        return torch.cat(
            [
                torch.nn.functional.scaled_dot_product_attention(
                    *(x.transpose(0, 1)[None] for x in one), is_causal=window_size == (-1, 0), enable_gqa=enable_gqa
                )[0].transpose(0, 1)
                for one in zip(*parts, strict=True)
            ]
        )

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "runs_packed", lambda device, shared: True)
    return calls


def gradients(layer: Attention, x: torch.Tensor, cotangent: torch.Tensor, **options) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y, state = layer(x, **options)
    assert (state is None) == (options.get("output_state") is False)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], cotangent)]


@pytest.mark.parametrize("lengths", [[6, 3, 0, 4], [1, 12]])
@pytest.mark.parametrize(("kv_heads", "rope_theta", "positions"), [(4, None, False), (2, 50.0, False), (4, 50.0, True)])
def test_packed_sequences_attend_without_padding(
    packed_calls: list[dict], lengths: list[int], kv_heads: int, rope_theta: float | None, positions: bool
) -> None:
    layer = Attention(16, 4, kv_heads, head_dim=8, rope_theta=rope_theta).bfloat16()
    total = sum(lengths)
    packing = Packing.from_cu_seqlens(torch.tensor([0, *lengths]).cumsum(0), total)
    x, cotangent = torch.randn(2, 1, total, 16).bfloat16().unbind()
    options = {"packing": packing, "position_ids": torch.arange(total)[None] * 2 if positions else None}
    found = gradients(layer, x, cotangent, output_state=False, **options)
    assert packed_calls == [{"max": (max(lengths),) * 2, "window": (-1, 0), "gqa": kv_heads != 4}]
    exact = Attention(16, 4, kv_heads, head_dim=8, rope_theta=rope_theta).double()
    exact.load_state_dict(layer.state_dict())
    expected = gradients(exact, x.double(), cotangent.double(), **options)  # with its state: padded
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, torch.bfloat16, "gradient")
    assert len(packed_calls) == 1


def test_attention_pads_where_it_must(packed_calls: list[dict]) -> None:
    """For its state, after a state, in float32, and where sequences of one length need no padding anyway."""
    layer = Attention(16, 2)
    x = torch.randn(1, 6, 16)
    uneven, even = (Packing.from_cu_seqlens(torch.tensor(bounds), 6) for bounds in ([0, 4, 6], [0, 3, 6]))
    _, state = layer(x, packing=uneven)
    layer(x, packing=uneven, output_state=False)
    half = layer.bfloat16()
    half(x.bfloat16(), packing=even, output_state=False)
    half(x.bfloat16(), state, packing=uneven, output_state=False)
    assert packed_calls == []
    half(x.bfloat16(), packing=uneven, output_state=False)
    assert len(packed_calls) == 1


def test_packed_attention_has_the_arguments_that_are_given() -> None:
    signature = inspect.signature(varlen.varlen_attn)
    shared_heads = {"enable_gqa": True} if "enable_gqa" in signature.parameters else {}  # not in torch 2.11
    bound = signature.bind(*"qkvofmn", window_size=(-1, 0), **shared_heads)
    assert list(bound.arguments)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert not attention.runs_packed(torch.device("cpu"), False)


@pytest.mark.skipif(
    not (torch.cuda.is_available() and attention.runs_packed(torch.device("cuda", 0), False)),
    reason="needs a GPU with flash attention",
)
@pytest.mark.parametrize("compiled", [False, True])
def test_packed_attention_on_a_gpu_is_that_of_each_sequence(compiled: bool) -> None:
    lengths = [70, 3, 0, 200]
    layer = Attention(128, 2, rope_theta=50.0).cuda().bfloat16()
    packing = Packing.from_cu_seqlens(torch.tensor([0, *lengths], device="cuda").cumsum(0), sum(lengths))
    x, cotangent = torch.randn(2, 1, sum(lengths), 128, device="cuda").bfloat16().unbind()
    if compiled:
        layer.compile(fullgraph=True)
    found = gradients(layer, x, cotangent, packing=packing, output_state=False)
    exact = Attention(128, 2, rope_theta=50.0).cuda().double()
    exact.load_state_dict(layer.state_dict())
    expected = gradients(exact, x.double(), cotangent.double(), packing=packing)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, torch.bfloat16, "gradient")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, r"num_kv_heads \(3\) must divide num_heads \(4\)"),
        ({"num_heads": 5}, r"num_heads \(5\) must divide hidden_size \(12\)"),
        ({"num_heads": 4, "rope_theta": 100.0}, r"head_dim \(3\) even"),
        ({"num_heads": 4, "head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"num_heads": 2.0}, "num_heads must be a whole number, got 2.0"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(12, **options)
