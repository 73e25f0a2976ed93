"""One token of the layer as one operator: against float64, in place, in a CUDA graph, under the compiler."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from m2rnn.layers import M2RNN
from m2rnn.layers.m2rnn import M2RNNState, StaticM2RNNState
from m2rnn.layers.projection import OutputProjection, project_token
from m2rnn.ops.backends.cuda import compiler
from m2rnn.ops.decode import FEW_ROWS, decode_step, few_rows_linear
from m2rnn.ops.decode.cuda import step
from m2rnn.ops.decode.token import Token
from tests.tolerances import assert_close, relative_error

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0) or step.why_unavailable() is not None,
    reason="needs a GPU of compute capability 8.0 or newer, and cuda-core",
)
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

PAPER = {"heads": 84, "key": 64, "value": 16}
SHARED = {"heads": 12, "q": 2, "k": 3, "v": 4, "f": 12, "g": 6, "w": 2}
CASES = {
    "paper": PAPER,
    "paper, batch 3": {**PAPER, "batch": 3},
    "paper, batch 20": {**PAPER, "batch": 20},
    "paper, batch 64": {**PAPER, "batch": 64},
    "paper, batch 300": {**PAPER, "batch": 300},
    "V 8": {"batch": 2, "heads": 4, "key": 32, "value": 8},
    "V 8, batch 700": {"batch": 700, "heads": 16, "key": 64, "value": 8},
    "V 32": {"batch": 2, "heads": 6, "key": 64, "value": 32},
    "V 32, batch 200": {"batch": 200, "heads": 12, "key": 64, "value": 32},
    "V 64": {"batch": 3, "heads": 3, "key": 64, "value": 64},
    "V 64, batch 60": {"batch": 60, "heads": 20, "key": 64, "value": 64},
    "shared heads": {"batch": 5, "key": 16, "value": 16, **SHARED},
    "shared heads, one head of v": {
        "batch": 5,
        "key": 16,
        "value": 16,
        **SHARED,
        "k": 12,
        "v": 1,
        "f": 1,
        "g": 1,
        "w": 1,
    },
    "shared heads, batch 600": {"batch": 600, "key": 48, "value": 16, **SHARED},
    "own heads": {"batch": 2, "heads": 5, "key": 24, "value": 16, "q": 5, "k": 5},
    "one head": {"batch": 2, "heads": 1, "key": 64, "value": 16},
    "K 1": {"batch": 2, "heads": 4, "key": 1, "value": 16},
    "K 17": {"batch": 2, "heads": 4, "key": 17, "value": 8},
    "K 200": {"batch": 2, "heads": 4, "key": 200, "value": 16},
    "K 200, batch 300": {"batch": 300, "heads": 8, "key": 200, "value": 16},
    "no convolution": {"batch": 2, "heads": 4, "key": 16, "value": 16, "width": 0},
    "width 1": {"batch": 2, "heads": 4, "key": 16, "value": 16, "width": 1},
    "width 2": {"batch": 2, "heads": 4, "key": 16, "value": 16, "width": 2},
    "width 8, no bias": {"batch": 2, "heads": 4, "key": 16, "value": 16, "width": 8, "bias": False},
    "no SiLU": {"batch": 2, "heads": 4, "key": 16, "value": 16, "silu": False},
    "no output gate": {"batch": 2, "heads": 4, "key": 16, "value": 16, "g": 0},
    "no D": {"batch": 2, "heads": 4, "key": 16, "value": 16, "D": False},
    "no norm": {"batch": 2, "heads": 4, "key": 16, "value": 16, "norm": False},
    "nothing": {"heads": 4, "key": 16, "value": 32, "width": 0, "silu": False, "g": 0, "D": False, "norm": False},
    "no sequence": {"batch": 0, "heads": 4, "key": 16, "value": 16},
}


def problem(
    heads: int,
    key: int,
    value: int,
    batch: int = 1,
    q: int = 1,
    k: int = 1,
    v: int | None = None,
    f: int | None = None,
    g: int | None = None,
    w: int | None = None,
    width: int = 4,
    bias: bool = True,
    silu: bool = True,
    D: bool = True,
    norm: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Arguments of ``decode_step`` on the CPU."""
    v, f, g, w = (heads if count is None else count for count in (v, f, g, w))
    channels = (q + k) * key + v * value
    normal = torch.randn
    return {
        "projected": normal(batch, channels + f + g * value).to(dtype),
        "state": normal(batch, heads, key, value).clamp(-1, 1),
        "conv_state": normal(batch, width - 1, channels).to(dtype) if width else None,
        "weight": (torch.eye(value) + 0.3 * normal(w, value, value)).to(dtype),
        "A_log": normal(f),
        "dt_bias": normal(f) - 1,
        "conv_weight": (normal(channels, 1, width) * 0.5).to(dtype) if width else None,
        "conv_bias": normal(channels).to(dtype) if width and bias else None,
        "D": normal(heads, value).to(dtype) if D else None,
        "norm_weight": (1 + 0.3 * normal(heads * value)).to(dtype) if norm else None,
        "q_heads": q,
        "k_heads": k,
        "v_heads": v,
        "g_heads": g,
        "silu": silu,
    }


def moved(arguments: dict[str, Any], *to: Any) -> dict[str, Any]:
    return {name: x.to(*to) if isinstance(x, Tensor) else x for name, x in arguments.items()}


def clone(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in arguments.items()}


def assert_kernel_takes(arguments: dict[str, Any]) -> None:
    assert step.why_not(Token(**arguments, norm_eps=1e-5, backend=None)) is None


@pytest.mark.parametrize("in_place", [False, True])
def test_no_sequence_gives_none(in_place: bool) -> None:
    arguments = problem(**CASES["no sequence"])
    y, state, conv_state = decode_step(**arguments, in_place=in_place)
    assert (y.shape, state.shape) == ((0, 64), (0, 4, 16, 16))
    assert conv_state.shape == arguments["conv_state"].shape
    assert step.why_not(Token(**arguments, norm_eps=1e-5, backend=None)) == "the tensors are on cpu"


def by_hand(a: dict[str, Any], eps: float) -> tuple[Tensor, Tensor]:
    """y and the state of ``decode_step``, one sequence and head at a time."""
    batch, heads, key, value = a["state"].shape
    sizes = [a["q_heads"] * key, a["k_heads"] * key, a["v_heads"] * value, a["A_log"].numel(), a["g_heads"] * value]
    channels, ys, state = sum(sizes[:3]), [], torch.empty_like(a["state"])

    def of(x: Tensor, width: int, head: int) -> Tensor:
        """What a head reads of a vector that has ``width`` numbers for each head or for each of several that share."""
        parts = x.view(-1, width)
        return parts[head // (heads // len(parts))]

    for b in range(batch):
        qkv, rest = a["projected"][b].split((channels, sum(sizes[3:])))
        if a["conv_weight"] is not None:
            qkv = (torch.cat([a["conv_state"][b], qkv[None]]) * a["conv_weight"][:, 0].T).sum(0) + a["conv_bias"]
        q, k, v, logits, g = torch.cat([F.silu(qkv), rest]).split(sizes)
        y = []
        for n in range(heads):
            f = torch.exp(-of(a["A_log"], 1, n).exp() * F.softplus(of(logits, 1, n) + of(a["dt_bias"], 1, n)))
            h, w = a["state"][b, n], of(a["weight"], value * value, n).view(value, value)
            state[b, n] = f * h + (1 - f) * torch.tanh(h @ w + torch.outer(of(k, key, n), of(v, value, n)))
            out = of(q, key, n) @ state[b, n] + a["D"][n] * of(v, value, n)
            y.append(out * F.silu(of(g, value, n)))
        flat = torch.cat(y)
        ys.append(flat / (flat.square().mean() + eps).sqrt() * a["norm_weight"])
    return torch.stack(ys), state


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("case", ["shared heads", "shared heads, one head of v", "own heads", "no convolution"])
def test_a_token_on_the_cpu_is_the_equations_by_hand(case: str, dtype: torch.dtype) -> None:
    """In the precision of the state, which is float32 for all narrower inputs."""
    arguments = problem(**CASES[case], dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments["state"] = arguments["state"].to(wide)
    y, state = by_hand(moved(arguments, torch.float64), 0.5)
    results = decode_step(**arguments, norm_eps=0.5)
    assert_close(results[0], y, dtype, "output", "y")
    assert_close(results[1], state, wide, "state", "state")


def test_a_backend_that_cannot_decode_is_an_error() -> None:
    with pytest.raises(ValueError, match="backend='cuda' cannot run"):
        decode_step(**problem(2, 3, 8), backend="cuda")


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_kernel_is_the_equations(case: str, dtype: torch.dtype) -> None:
    arguments = problem(**CASES[case], dtype=dtype)
    y, state, conv_state = decode_step(**moved(arguments, torch.float64))
    on_gpu = moved(arguments, "cuda")
    assert_kernel_takes(on_gpu)
    before = clone(on_gpu)
    results = decode_step(**on_gpu)
    assert_close(results[0], y, dtype, "output", "y")
    assert_close(results[1], state, dtype, "state", "state")
    assert (results[0].dtype, results[1].dtype) == (dtype, torch.float32)
    if conv_state is not None:
        assert torch.equal(results[2].double().cpu(), conv_state)
    for name, x in before.items():
        assert not isinstance(x, Tensor) or torch.equal(x, on_gpu[name]), f"{name} was changed"
    for again, result in zip(decode_step(**on_gpu), results, strict=True):
        assert result is None or torch.equal(again, result)
    y_in_place, _, _ = decode_step(**on_gpu, in_place=True)
    for x, result in zip((y_in_place, on_gpu["state"], on_gpu["conv_state"]), results, strict=True):
        assert result is None or torch.equal(x, result)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks before a launch take tensors of the CPU for those of an H100."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(step, "why_unavailable", lambda: None)
    monkeypatch.setattr(step, "_gpu", lambda device: (9, 132, 227 << 10))


def columns_first(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def beside_alignment(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


WITHOUT_KERNEL = {
    "dtype": ({"dtype": torch.float64}, {}, "the inputs are torch.float64"),
    "V": ({"value": 24}, {}, "V is 24"),
    "taps": ({"width": 9}, {}, "9 taps"),
    "wider weight": ({"dtype": torch.bfloat16}, {"weight": Tensor.float}, "mixed"),
    "narrower state": ({}, {"state": Tensor.half}, "mixed"),
    "wider A_log": ({}, {"A_log": Tensor.double}, "mixed"),
    "layout of the row": ({}, {"projected": columns_first}, "not contiguous"),
    "layout of the state": ({}, {"state": columns_first}, "not contiguous"),
    "layout of the convolution's": ({}, {"conv_state": columns_first}, "not contiguous"),
    "layout of the weight": ({}, {"weight": columns_first}, "not contiguous"),
    "alignment of the state": ({}, {"state": beside_alignment}, "aligned to 16 bytes"),
    "many heads": ({"heads": 800}, {}, "do not fit"),
}


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("what", WITHOUT_KERNEL)
def test_what_the_kernel_would_read_wrongly_it_does_not_take(what: str) -> None:
    sizes, changes, reason = WITHOUT_KERNEL[what]
    good = {"heads": 4, "key": 16, "value": 16, "batch": 2}
    assert_kernel_takes(problem(**good))
    arguments = problem(**good | sizes)
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    assert reason in step.why_not(Token(**arguments, norm_eps=1e-5, backend=None))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_what_the_linear_kernel_would_read_wrongly_it_does_not_take() -> None:
    x, weight = torch.randn(2, 16), torch.randn(5, 16)
    assert step.why_not_linear(x, weight) is None
    assert "float32 and torch.bfloat16" in step.why_not_linear(x, weight.bfloat16())
    for other in (columns_first(weight), beside_alignment(weight), torch.randn(5, 18)):
        assert "not aligned" in step.why_not_linear(x, other)


def _nvrtc_loads() -> bool:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
        import cuda.core  # noqa: F401
    except Exception:  # what it raises differs between its versions
        return False
    return True


@pytest.mark.skipif(not _nvrtc_loads(), reason="needs cuda-core and NVRTC")
@pytest.mark.parametrize(
    ("dtype", "value", "width", "latency", "capability"),
    [
        (torch.bfloat16, 16, 4, True, (9, 0)),
        (torch.bfloat16, 16, 4, False, (8, 0)),
        (torch.float16, 8, 0, False, (10, 0)),
        (torch.float32, 64, 1, False, (12, 0)),
    ],
)
def test_kernels_compile_without_a_gpu(
    dtype: torch.dtype,
    value: int,
    width: int,
    latency: bool,
    capability: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("M2RNN_CACHE_DIR", str(tmp_path))
    code = compiler.cubin("step", step._step_macros(dtype, 40, value, width, latency), capability)
    assert b"m2rnn_step" in code
    assert b"m2rnn_linear" in compiler.cubin("linear", step._linear_macros(dtype, 2, 5), capability)


@needs_gpu
@pytest.mark.parametrize("batch", [3, 300])
def test_bad_numbers_stay_in_their_sequence_and_head(batch: int) -> None:
    arguments = moved(problem(4, 20, 16, batch, norm=False, dtype=torch.bfloat16), "cuda")
    arguments["conv_weight"].abs_()  # the infinity below stays positive, or SiLU makes it NaN
    y, state, _ = decode_step(**arguments)
    bad = clone(arguments)
    bad["state"][1, 2] = torch.nan
    bad["projected"][2, 40 + 16] = torch.inf  # v of head 1
    y_bad, state_bad, _ = decode_step(**bad)
    y, y_bad = y.view(batch, 4, 16), y_bad.view(batch, 4, 16)
    assert y_bad[1, 2].isnan().all()
    assert state_bad[1, 2].isnan().all()
    assert not state_bad[2].isnan().any(), "the update saturates"
    good = torch.ones(batch, 4, dtype=torch.bool, device="cuda")
    good[1, 2] = good[2, 1] = False
    assert torch.equal(y[good], y_bad[good])
    assert torch.equal(state[good], state_bad[good])


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", range(1, FEW_ROWS + 1))
@pytest.mark.parametrize(("columns", "channels"), [(8, 3), (1024, 2900), (1344, 1024), (4104, 37)])
def test_few_rows_linear_is_a_linear_layer(rows: int, dtype: torch.dtype, columns: int, channels: int) -> None:
    x, weight = torch.randn(rows, columns).to(dtype), torch.randn(channels, columns).to(dtype)
    result = few_rows_linear(x.cuda(), weight.cuda())
    assert step.why_not_linear(x.cuda(), weight.cuda()) is None
    assert_close(result, x.double() @ weight.double().T, dtype, "output")


def layer_and_tokens(device: str, dtype: torch.dtype, batch: int = 2) -> tuple[M2RNN, list[Tensor]]:
    layer = M2RNN(32, 6, 16, 8, num_k_heads=2, num_g_heads=3).to(device, dtype)
    for name, parameter in layer.named_parameters():
        if "decay" not in name:
            torch.nn.init.normal_(parameter, 0.1, 0.5)
    tokens = torch.randn(7, batch, 1, 32).to(dtype)
    return layer, list(tokens.to(device))


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_tokens_follow_float64(device: str, dtype: torch.dtype, batch: int) -> None:
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]  # projections are rounded
    layer, tokens = layer_and_tokens(device, dtype, batch)
    exact = M2RNN(32, 6, 16, 8, num_k_heads=2, num_g_heads=3).double()
    exact.load_state_dict(layer.state_dict())
    y, state = layer(tokens[0])
    static = state.static(99)
    _, expected_state = exact(tokens[0].double().cpu())
    for token in tokens[1:]:
        expected, expected_state = exact(token.double().cpu(), expected_state)
        y, state = layer(token, state)
        y_static, static = layer(token, static)
        assert torch.equal(y, y_static)
        assert y.dtype == dtype
        assert relative_error(y, expected) < tolerance
    assert relative_error(state.recurrent, expected_state.recurrent) < tolerance


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_a_static_state_keeps_its_place_and_a_dynamic_one_its_values(device: str) -> None:
    layer, tokens = layer_and_tokens(device, torch.float32)
    _, state = layer(tokens[0])
    before = M2RNNState(*(x.clone() for x in state))
    static = state.static(99)
    addresses = [x.data_ptr() for x in static]
    after = layer(tokens[1], static)[1]
    assert isinstance(after, StaticM2RNNState)
    assert [x.data_ptr() for x in after] == addresses
    _, following = layer(tokens[1], state)
    for old, kept, new, static_new in zip(state, before, following, static, strict=True):
        assert torch.equal(old, kept)
        assert torch.equal(new, static_new)
        assert not torch.equal(old, new)
    dynamic = static.dynamic()
    layer(tokens[2], static)
    assert all(torch.equal(x, y) for x, y in zip(dynamic, following, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("static", [False, True])
def test_a_token_with_gradients_has_those_of_the_layer_and_leaves_its_state_alone(static: bool, device: str) -> None:
    layer, tokens = layer_and_tokens(device, torch.float32)
    with torch.no_grad():
        _, state = layer(tokens[0])
    before = M2RNNState(*(x.clone() for x in state))
    given = state.static(9) if static else state
    y, after = layer(tokens[1], given)
    expected, _ = layer(torch.cat([tokens[0], tokens[1]], 1))
    cotangent = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, [layer.norm.weight], cotangent, retain_graph=True)
    assert_close(
        found, torch.autograd.grad(expected[:, -1:], [layer.norm.weight], cotangent)[0], torch.float32, "gradient"
    )
    assert not isinstance(after, StaticM2RNNState)
    assert all(torch.equal(x, kept) for x, kept in zip(given, before, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("conv", [True, False])
def test_operators_are_registered_properly(device: str, conv: bool) -> None:
    arguments = moved(problem(4, 16, 16, 2, width=4 if conv else 0), device)
    order = [
        *(arguments[name] for name in ("projected", "state", "conv_state", "weight", "A_log", "dt_bias")),
        *(arguments[name] for name in ("conv_weight", "conv_bias", "D", "norm_weight")),
        1e-5, 1, 1, 4, 4, True, None,
    ]  # fmt: skip
    library.opcheck(torch.ops.m2rnn.decode_step.default, order)
    library.opcheck(torch.ops.m2rnn.decode_step_.default, order)
    order[1] = order[1].transpose(1, 2).contiguous().transpose(1, 2)
    library.opcheck(torch.ops.m2rnn.decode_step.default, order)
    library.opcheck(
        torch.ops.m2rnn.few_rows_linear.default, (torch.randn(2, 16, device=device), torch.randn(5, 16, device=device))
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_compiled_decoding_has_no_graph_break(device: str, static: bool) -> None:
    torch.compiler.reset()
    layer, tokens = layer_and_tokens(device, torch.float32)
    _, start = layer(tokens[0])
    state, compiled_state = (start.static(9), start.static(9)) if static else (start, start)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for token in tokens[1:]:
        y, state = layer(token, state)
        compiled_y, compiled_state = compiled(token, compiled_state)
        assert_close(compiled_y, y, torch.float32, "output")
    assert_close(compiled_state.recurrent, state.recurrent, torch.float32, "state")


@needs_gpu
@pytest.mark.parametrize("batch", [1, 7])
@torch.no_grad()
def test_a_captured_layer_repeats_eager_decoding(batch: int) -> None:
    layer, tokens = layer_and_tokens("cuda", torch.bfloat16, batch)
    _, start = layer(tokens[0])
    state, static, x = start, start.static(9), tokens[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(x, start.static(9))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = layer(x, static)
    for token in tokens[1:]:
        x.copy_(token)
        graph.replay()
        expected, state = layer(token, state)
        assert torch.equal(y, expected)
    assert torch.equal(static.recurrent, state.recurrent)
    assert torch.equal(static.conv, state.conv)


@torch.no_grad()
def test_projections_that_are_more_than_a_linear_layer_are_called() -> None:
    linear, x, calls = OutputProjection(8, 3), torch.randn(2, 8), []
    hook = linear.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(project_token(linear, x), linear(x))
    assert len(calls) == 2
    hook.remove()
    adapted = torch.nn.Sequential(linear, torch.nn.Tanh())  # has no weight of its own, as some quantised layers
    assert torch.equal(project_token(adapted, x), linear(x).tanh())
    layer, tokens = layer_and_tokens("cpu", torch.float32)
    _, state = layer(tokens[0])
    expected, _ = layer(tokens[1], state)
    layer.in_proj = torch.nn.Sequential(layer.in_proj)
    assert torch.equal(layer(tokens[1], state)[0], expected)


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_a_norm_before_the_gate_takes_the_modules_for_single_tokens(
    static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoding operator gates first."""
    layer = M2RNN(32, 6, 16, 8, num_k_heads=2, num_g_heads=3, norm_before_gate=True).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.5)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    whole, final = layer(x)
    monkeypatch.setattr("m2rnn.layers.m2rnn.decode_step", lambda *_, **__: pytest.fail("the operator ran"))
    y, state = layer(x[:, :3])
    first = state = state.static(9) if static else state  # kept: its memory would be given to a later state
    values = [part.clone() for part in first]
    parts = [y]
    for token in x[:, 3:].split(1, 1):
        y, state = layer(token, state)
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole, torch.float64, "output")
    assert_close(state.recurrent, final.recurrent, torch.float64, "state")
    assert [kept.data_ptr() == part.data_ptr() for kept, part in zip(first, state, strict=True)] == [static] * 2
    assert all(torch.equal(kept, value) for kept, value in zip(first, values, strict=True)) is not static


@torch.no_grad()
@pytest.mark.parametrize("part", ["conv", "decay_gate", "norm"])
def test_hooks_of_a_layers_parts_run_for_single_tokens_too(part: str) -> None:
    layer, tokens = layer_and_tokens("cpu", torch.float32)
    _, state = layer(tokens[0])
    expected, after = layer(tokens[1], state)
    calls = []
    getattr(layer, part).register_forward_hook(lambda *_: calls.append(1))
    static = state.static(9)
    y, kept = layer(tokens[1], static)
    assert calls == [1]
    assert kept is static
    assert_close(y, expected, torch.float32, "output")
    for x, reference in zip(kept, after, strict=True):
        assert_close(x, reference, torch.float32, "state")
