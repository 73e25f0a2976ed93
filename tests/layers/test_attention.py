"""Attention against softmax written out, and what its state can do."""

import inspect
import math
from itertools import pairwise

import pytest
import torch
from torch.nn.attention import varlen

from m2rnn.layers import Attention, Packing, attention
from m2rnn.models import M2RNNCache
from tests.layers.equations import assert_layer_is, rms_norm
from tests.models.small import VOCAB, make
from tests.tolerances import assert_close, relative_error


def straight_line(layer: Attention, x: torch.Tensor) -> torch.Tensor:
    """One sequence ``x`` [T, hidden], one query and one head at a time."""
    heads, kv_heads, dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
    projected = x @ layer.in_proj.weight.T
    q, k, v = (
        part.unflatten(1, (-1, dim)) for part in projected.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    )
    if layer.q_norm is not None:
        q = torch.stack([torch.stack([rms_norm(head, layer.q_norm.weight) for head in row]) for row in q])
        k = torch.stack([torch.stack([rms_norm(head, layer.k_norm.weight) for head in row]) for row in k])
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
        seen = slice(0 if layer.window is None else max(0, t + 1 - layer.window), t + 1)
        for n in range(heads):
            m = n // (heads // kv_heads)
            weight = torch.exp(k[seen, m] @ q[t, n] / math.sqrt(dim))
            row.append(weight @ v[seen, m] / weight.sum())
        rows.append(layer.out_proj.weight @ torch.cat(row))
    return torch.stack(rows)


@pytest.mark.parametrize("rope_theta", [None, 50.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_its_equation(kv_heads: int, rope_theta: float | None) -> None:
    layer = Attention(12, 4, kv_heads, head_dim=6, rope_theta=rope_theta).double()
    x = 3 * torch.randn(7, 12, dtype=torch.float64)
    assert_close(layer(x[None])[0][0], straight_line(layer, x), torch.float64, "output")


@pytest.mark.parametrize("rope_theta", [None, 50.0])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2)])
@pytest.mark.parametrize("options", [{"window": 1}, {"window": 3}, {"window": 7}, {"window": 99}, {"qk_norm": True}])
def test_windows_and_norms_are_their_equations(
    options: dict, heads: int, kv_heads: int, rope_theta: float | None
) -> None:
    layer = Attention(8, heads, kv_heads, head_dim=4, rope_theta=rope_theta, **options)
    assert_layer_is(layer, lambda x: straight_line(layer, x), 8)
    both = Attention(8, heads, kv_heads, head_dim=4, rope_theta=rope_theta, qk_norm=True, window=2)
    assert_layer_is(both, lambda x: straight_line(both, x), 8)


def test_a_window_is_of_the_sequences_own_tokens_in_every_path() -> None:
    """Rows padded anywhere, packed, in pieces with a state, and token by token in place."""
    layer = Attention(8, 4, 2, head_dim=4, rope_theta=50.0, qk_norm=True, window=3).double()
    lengths = [9, 1, 4, 12]
    rows = [torch.randn(length, 8, dtype=torch.float64) for length in lengths]
    expected = [straight_line(layer, row) for row in rows]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    packed, state = layer(torch.cat(rows)[None], packing=Packing.from_cu_seqlens(bounds, sum(lengths)))
    assert_close(packed[0], torch.cat(expected), torch.float64, "output")

    holes = torch.zeros(len(rows), 15, dtype=torch.long)
    for n, length in enumerate(lengths):
        holes[n, torch.randperm(15)[:length]] = 1
    y, _ = layer(torch.cat(rows)[None], packing=Packing.from_mask(holes))
    assert_close(y[0], torch.cat(expected), torch.float64, "output")

    following = torch.randn(len(rows), 5, 8, dtype=torch.float64)  # after states with padding of different lengths
    whole = [straight_line(layer, torch.cat(parts)) for parts in zip(rows, following, strict=True)]
    after, _ = layer(following, state)
    assert_close(after, torch.stack([y[-5:] for y in whole]), torch.float64, "output")
    with torch.no_grad():
        growing, fixed = state, state.static(17)
        for t in range(5):
            one, growing = layer(following[:, t : t + 1], growing)
            in_place, fixed = layer(following[:, t : t + 1], fixed)
            assert_close(one, after[:, t : t + 1], torch.float64, "output")
            assert_close(in_place, one, torch.float64, "output")

    state, parts = None, []
    for start, end in pairwise([0, 2, 3, 3, 8, 12]):
        y, state = layer(rows[3][None, start:end], state)
        parts.append(y[0])
    assert_close(torch.cat(parts), expected[3], torch.float64, "output")


def test_no_token_sees_beyond_its_window() -> None:
    layer, x = Attention(8, 2, window=3), torch.randn(1, 9, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0][0, 6].square().sum(), x)
    assert (gradient[0].abs().amax(1) > 0).tolist() == [4 <= t <= 6 for t in range(9)]


def test_options_are_off_by_default_and_name_their_parameters() -> None:
    torch.manual_seed(3)
    plain = Attention(8, 2, rope_theta=10.0)
    assert [*plain.state_dict()] == ["in_proj.weight", "out_proj.weight"]
    torch.manual_seed(3)
    layer = Attention(8, 2, rope_theta=10.0, qk_norm=True, window=5)
    assert {name: tuple(x.shape) for name, x in layer.state_dict().items()} == {
        "in_proj.weight": (24, 8),
        "q_norm.weight": (4,),
        "k_norm.weight": (4,),
        "out_proj.weight": (8, 8),
    }
    assert all(torch.equal(layer.state_dict()[name], x) for name, x in plain.state_dict().items())


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
    rotated = attention.rotate(x, attention.rotary_tables(positions, 8, 10000.0, dtype))
    exact = attention.rotary_tables(positions, 8, 10000.0, torch.float64)
    assert_close(rotated, attention.rotate(x.double(), exact), dtype, "output")


def test_rotary_positions_are_the_formula_in_float32() -> None:
    x, positions = torch.randn(2, 300, 3, 16), torch.randint(5000, (2, 300))
    half = torch.arange(8, dtype=torch.float32)
    angle = (positions.float()[..., None] * 10000.0 ** (-half / 8))[:, :, None]
    a, b = x[..., :8], x[..., 8:]
    expected = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
    rotated = attention.rotate(x, attention.rotary_tables(positions, 16, 10000.0, torch.float32))
    assert relative_error(rotated, expected) < 1e-6
    assert rotated.dtype == torch.float32


def test_bfloat16_attends_at_far_positions_as_float64_does() -> None:
    layer = Attention(32, 4, 2, rope_theta=10000.0, qk_norm=True).bfloat16()
    exact = Attention(32, 4, 2, rope_theta=10000.0, qk_norm=True).double()
    exact.load_state_dict(layer.state_dict())
    heads = torch.randn(1, 50, 6, 8).bfloat16()
    positions = torch.arange(50)[None] * 83
    tables = attention.rotary_tables(positions, 8, 10000.0, torch.bfloat16)
    assert tables.cos.dtype == tables.sin.dtype == torch.float32
    assert tables.cos.shape == (1, 50, 1, 4)
    truth = attention.rotate(heads.double(), attention.rotary_tables(positions, 8, 10000.0, torch.float64))
    assert_close(attention.rotate(heads, tables), truth, torch.bfloat16, "output")
    x = torch.randn(1, 50, 32).bfloat16()
    y, _ = layer(x, position_ids=positions)
    reference, _ = exact(x.double(), position_ids=positions)
    assert relative_error(y, reference) < 3e-2  # the projections are rounded, too


def test_given_tables_replace_the_layers_own() -> None:
    layer, x = Attention(8, 2, rope_theta=10.0), torch.randn(2, 5, 8)
    positions = torch.arange(5)[None] * 3
    tables = attention.rotary_tables(positions, 4, 10.0, torch.float32)
    assert torch.equal(layer(x, rotary=tables)[0], layer(x, position_ids=positions)[0])


@pytest.mark.parametrize("how", ["dense", "packed", "cached"])
def test_a_model_makes_the_tables_once_for_all_layers_with_the_same_positions(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("rope", mixers=["attention"] * 4)
    model.model.layers[2].mixer.rope_theta = 7.0
    made = []

    def rotary_tables(*arguments):
        made.append(arguments[2])
        return attention.rotary_tables(*arguments)

    monkeypatch.setattr("m2rnn.models.model.rotary_tables", rotary_tables)
    own = monkeypatch.context()
    ids = torch.randint(VOCAB, (1, 9))
    cache = M2RNNCache(4)
    if how == "cached":
        model(ids, past_key_values=cache)
        made.clear()
    arguments = {
        "dense": {},
        "packed": {"cu_seq_lens_q": torch.tensor([0, 4, 9])},
        "cached": {"past_key_values": cache},
    }[how]
    states = [layer.state for layer in cache.layers]
    found = model(ids, **arguments).logits
    assert made == [100.0, 7.0]
    hidden = model.model.embed_tokens(ids)
    packing = Packing.from_cu_seqlens(torch.tensor([0, 4, 9]), 9) if how == "packed" else None
    with own as patch:
        patch.setattr("m2rnn.models.model.rotary_tables", None)
        for block, state in zip(model.model.layers, states, strict=True):
            hidden, *_ = block(hidden, state, packing)
    assert torch.equal(model.lm_head(model.model.norm(hidden)), found)


def test_casting_a_layers_inputs_as_fsdp_does_leaves_the_tables_in_float32() -> None:
    tables = attention.rotary_tables(torch.arange(4)[None], 8, 10.0, torch.bfloat16)
    (cast,) = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.bfloat16, (tables,))
    assert cast.cos.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"window": 4, "qk_norm": True}])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of dynamo's own
def test_compiled_blocks_serve_new_lengths_and_packings_without_compiling_again(options: dict) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    mixers = ["m2rnn", "attention", "attention", "m2rnn"]
    attends = {"num_heads": 4, "num_kv_heads": 2, "rope_theta": 100.0} | options
    sizes = {"m2rnn": {"num_heads": 2, "key_dim": 4, "value_dim": 4}, "attention": attends}
    model = make("rope", mixers=mixers, mixer_options=sizes).train()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.model.layers:
        block.compile(backend=counter, fullgraph=True)
    compiled = []
    for length in (6, 9, 12, 15, 7):
        ids = torch.randint(VOCAB, (2, length))
        with torch.compiler.set_stance("force_eager"):
            expected = model(ids, labels=ids, use_cache=False).loss
        loss = model(ids, labels=ids, use_cache=False).loss
        assert_close(loss, expected, torch.float64, "output")
        loss.backward()
        compiled.append(counter.frame_count)
    assert compiled[0] == 2, "one kind of layer is compiled once"
    assert compiled[1:] == [compiled[1]] * 4
    packed = []
    for bounds in ([0, 4, 10], [0, 5, 7, 15], [0, 1, 2, 3, 14], [0, 9, 11]):
        ids = torch.randint(VOCAB, (1, bounds[-1]))
        model(ids, labels=ids, use_cache=False, cu_seq_lens_q=torch.tensor(bounds)).loss.backward()
        packed.append(counter.frame_count)
    assert packed[1:] == [packed[1]] * 3


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"rope_theta": 10.0, "qk_norm": True}])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of dynamo's own
@torch.no_grad()
def test_compiled_decoding_with_a_growing_state_has_no_graph_break(options: dict) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    layer, counter = Attention(8, 2, **options).double(), CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    compilations = []
    for steps in (5, 6, 9):  # of a prompt; then what may follow it
        prompt = torch.randn(2, steps, 8, dtype=torch.float64)
        _, state = layer(prompt)
        _, compiled_state = layer(prompt)
        for more in (1, 1, 1, 1, 1, 1, 4, 3, 1):
            tokens = torch.randn(2, more, 8, dtype=torch.float64)
            expected, state = layer(tokens, state)
            y, compiled_state = compiled(tokens, compiled_state)
            assert_close(y, expected, torch.float64, "output")
        compilations.append(counter.frame_count)
    assert compilations[1] <= 4
    assert compilations[2] == compilations[1]


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
        left, right = window_size
        assert right == 0
        outputs = []
        for one in zip(*parts, strict=True):
            seen = torch.ones(len(one[0]), len(one[0]), dtype=torch.bool).tril()
            y = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in one),
                attn_mask=seen if left < 0 else seen.triu(-left),
                enable_gqa=enable_gqa,
            )
            outputs.append(y[0].transpose(0, 1))
        return torch.cat(outputs)

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


@pytest.mark.parametrize("window", [2, 3, 99])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("dense", [False, True])
def test_windows_attend_without_a_mask_where_torch_can(
    packed_calls: list[dict], dense: bool, kv_heads: int, window: int
) -> None:
    options = {"head_dim": 8, "rope_theta": 50.0, "window": window, "qk_norm": True}
    layer = Attention(16, 4, kv_heads, **options).bfloat16()
    exact = Attention(16, 4, kv_heads, **options).double()
    exact.load_state_dict(layer.state_dict())
    x, cotangent = torch.randn(2, 3 if dense else 1, 13, 16).bfloat16().unbind()
    packing = None if dense else Packing.from_cu_seqlens(torch.tensor([0, 5, 6, 13]), 13)
    found = gradients(layer, x, cotangent, packing=packing, output_state=False)
    longest = 13 if dense else 7
    call = {"max": (longest, longest), "window": (window - 1, 0), "gqa": kv_heads != 4}
    assert packed_calls == ([] if dense and window == 99 else [call])
    expected = gradients(exact, x.double(), cotangent.double(), packing=packing)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, torch.bfloat16, "gradient")
    if dense:  # a prompt has the same output, and its state
        y, state = layer(x)
        assert torch.equal(y, found[0])
        following = torch.randn(3, 1, 16).bfloat16()
        reference, _ = exact(following.double(), exact(x.double())[1])
        assert relative_error(layer(following, state)[0], reference) < 3e-2


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
@pytest.mark.parametrize("options", [{}, {"window": 33, "qk_norm": True, "num_kv_heads": 1}, {"window": 1}])
@pytest.mark.parametrize("compiled", [False, True])
def test_packed_attention_on_a_gpu_is_that_of_each_sequence(compiled: bool, options: dict) -> None:
    lengths = [70, 3, 0, 200]
    layer = Attention(128, 2, rope_theta=50.0, **options).cuda().bfloat16()
    packing = Packing.from_cu_seqlens(torch.tensor([0, *lengths], device="cuda").cumsum(0), sum(lengths))
    x, cotangent = torch.randn(2, 1, sum(lengths), 128, device="cuda").bfloat16().unbind()
    if compiled:
        layer.compile(fullgraph=True)
    found = gradients(layer, x, cotangent, packing=packing, output_state=False)
    exact = Attention(128, 2, rope_theta=50.0, **options).cuda().double()
    exact.load_state_dict(layer.state_dict())
    expected = gradients(exact, x.double(), cotangent.double(), packing=packing)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, torch.bfloat16, "gradient")
    rows, cotangent = (tensor.view(3, 91, 128) for tensor in (x, cotangent))
    dense = gradients(layer, rows, cotangent)
    for ours, theirs in zip(dense, gradients(exact, rows.double(), cotangent.double()), strict=True):
        assert_close(ours, theirs, torch.bfloat16, "gradient")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 4, "num_kv_heads": 3}, r"num_kv_heads \(3\) must divide num_heads \(4\)"),
        ({"num_heads": 5}, r"num_heads \(5\) must divide hidden_size \(12\)"),
        ({"num_heads": 4, "rope_theta": 100.0}, r"head_dim \(3\) even"),
        ({"num_heads": 4, "head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"num_heads": 2.0}, "num_heads must be a whole number, got 2.0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": -3}, "window must be at least 1, got -3"),
        ({"window": 2.5}, "window must be a whole number, got 2.5"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(12, **options)
