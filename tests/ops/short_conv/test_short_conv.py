"""The fused short convolution against its definition in float64: Triton's interpreter, a GPU where there is one."""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, library

from m2rnn.ops.backends.choice import why_unavailable
from m2rnn.ops.short_conv import operator as operator
from m2rnn.ops.short_conv.operator import short_conv
from tests.ops.ahead_of_time import compile_kernels
from tests.ops.cases import lay_out
from tests.ops.triton_runs import GPU, runs_triton
from tests.tolerances import assert_close

pytest.importorskip("triton")
DEVICE = "cuda" if GPU else "cpu"
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes milliseconds for each step: a few dozen are many segments."""
    if not GPU:
        from m2rnn.ops.short_conv import triton as short_conv_triton

        monkeypatch.setattr(short_conv_triton, "SEGMENT", 8)


@dataclass(frozen=True)
class Case:
    """One problem; ``lengths`` are those of packed sequences and replace ``batch`` and ``time``."""

    batch: int = 2
    time: int = 13
    channels: int = 5
    width: int = 4
    lengths: tuple[int, ...] | None = None
    bias: bool = False
    silu: bool = True
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    weights: torch.dtype | None = None  # as dtype if None

    def __str__(self) -> str:
        packed = "+".join(map(str, self.lengths)) if self.lengths is not None else f"B{self.batch}-T{self.time}"
        rest = f"bias{self.bias}-silu{self.silu}-{self.layout}-{str(self.dtype)[6:]}-{str(self.weights)[6:]}"
        return f"{packed[:20]}-C{self.channels}-W{self.width}-{rest}"


@dataclass
class Problem:
    """x, weight and perhaps bias, which require grad, the gradient of y, and where packed sequences start."""

    case: Case
    inputs: dict[str, Tensor]
    dy: Tensor
    starts: Tensor | None


def make(case: Case, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    rows, steps = (case.batch, case.time) if case.lengths is None else (1, sum(case.lengths))

    def normal(dtype: torch.dtype, layout: str, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return lay_out(x.to(dtype), layout).to(DEVICE)

    weights = case.weights or case.dtype
    tensors = {
        "x": normal(case.dtype, case.layout, rows, steps, case.channels),
        "weight": normal(weights, "contiguous", case.channels, case.width),
    }
    if case.bias:
        tensors["bias"] = normal(weights, "contiguous", case.channels)
    dy = normal(case.dtype, case.layout, rows, steps, case.channels)
    starts = None
    if case.lengths is not None:
        lengths = torch.tensor(case.lengths, dtype=torch.int64)
        starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths).int().to(DEVICE)
    return Problem(case, {name: x.requires_grad_() for name, x in tensors.items()}, dy, starts)


def run(problem: Problem) -> dict[str, Tensor]:
    y = short_conv(**problem.inputs, silu=problem.case.silu, starts=problem.starts)
    gradients = torch.autograd.grad(y, list(problem.inputs.values()), problem.dy)
    return {"y": y.detach(), **dict(zip(problem.inputs, gradients, strict=True))}


def truth(problem: Problem) -> dict[str, Tensor]:
    """The definition in float64, one sequence at a time, differentiated by autograd."""
    case = problem.case
    inputs = {name: x.detach().double().cpu().requires_grad_() for name, x in problem.inputs.items()}
    x, weight = inputs["x"], inputs["weight"]
    parts = []
    for sequence in x.split(list(case.lengths), 1) if case.lengths is not None else [x]:
        before = torch.cat([sequence.new_zeros(sequence.shape[0], case.width - 1, case.channels), sequence], 1)
        steps = sequence.shape[1]
        parts.append(sum(weight[:, i] * before[:, i : i + steps] for i in range(case.width)))
    z = torch.cat([x[:, :0], *parts], 1) + inputs.get("bias", 0)
    y = z / (1 + torch.exp(-z)) if case.silu else z
    gradients = torch.autograd.grad(y, list(inputs.values()), problem.dy.double().cpu())
    return {"y": y.detach(), **dict(zip(inputs, gradients, strict=True))}


def check(results: dict[str, Tensor], problem: Problem) -> None:
    __tracebackhide__ = True
    expected = truth(problem)
    assert set(results) == set(expected)
    for name, x in results.items():
        assert x.dtype == (problem.case.dtype if name == "y" else problem.inputs[name].dtype), name
        assert_close(x, expected[name], problem.case.dtype, "output" if name == "y" else "gradient", name)


SMALL = [
    Case(),
    Case(batch=1, time=1, channels=1, width=1, bias=True),
    Case(batch=3, time=2, channels=3, width=8, bias=True, silu=False),
    Case(batch=5, time=9, channels=66, width=2, layout="sliced"),
    Case(batch=1, time=70, channels=4, width=3, bias=True, dtype=torch.float16),
    Case(time=10, layout="transposed", dtype=torch.bfloat16, weights=torch.float32),
    Case(time=10, layout="strided", width=3, dtype=torch.bfloat16, bias=True, weights=torch.float32),
    Case(time=10, layout="expanded", dtype=torch.float16, weights=torch.bfloat16),
    Case(lengths=(3, 0, 1, 10, 2, 1, 9), bias=True),
    Case(lengths=(1,) * 5 + (16, 5, 7), width=8, layout="sliced", dtype=torch.bfloat16, weights=torch.float32),
    Case(lengths=(7, 2, 7, 9), width=2, silu=False),
    Case(time=0, bias=True),
    Case(batch=0),
    Case(channels=0, bias=True),
    Case(lengths=(0, 0)),
]
LARGE = [
    replace(case, channels=channels)
    for channels in (1472, 201)
    for case in (
        Case(batch=8, time=1000, dtype=torch.bfloat16, weights=torch.float32),
        Case(lengths=(1000, 0, 1, 300, 4000, 33, 2), dtype=torch.bfloat16, weights=torch.float32),
        Case(lengths=(1000, 0, 1, 300, 4000, 33, 2), bias=True, width=5, layout="sliced"),
        Case(batch=3, time=1096, bias=True, silu=False, dtype=torch.float16, layout="transposed"),
    )
]


@runs_triton
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_results_and_gradients_match_float64(case: Case) -> None:
    problem = make(case)
    check(run(problem), problem)


@on_gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_many_programs_match_float64(case: Case) -> None:
    problem = make(case)
    check(run(problem), problem)


@runs_triton
@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_bias_and_starts_at_any_strides(layout: str) -> None:
    """Views, as of a column or of one number for all channels: the kernels read numbers that lie side by side."""
    problem = make(Case(lengths=(3, 9), bias=True))
    assert problem.starts is not None
    bias, starts = problem.inputs["bias"].detach(), torch.stack([problem.starts, problem.starts + 1], 1)[:, 0]
    bias = lay_out(bias, "strided") if layout == "strided" else bias[:1].expand(5)
    problem = replace(problem, inputs={**problem.inputs, "bias": bias.requires_grad_()}, starts=starts)
    check(run(problem), problem)


@runs_triton
def test_x_and_the_gradient_of_y_at_different_strides() -> None:
    """x a part of a wide projection, the gradient dense: other divisors of their strides, so other loads."""
    problem = make(Case(channels=4, layout="sliced"))
    problem = replace(problem, dy=problem.dy.contiguous())
    check(run(problem), problem)


@on_gpu
def test_the_same_bits_on_every_run() -> None:
    problem = make(LARGE[1])
    expected = run(problem)
    for _ in range(5):
        for name, x in run(problem).items():
            assert torch.equal(x, expected[name]), name


@runs_triton
@pytest.mark.parametrize("silu", [False, True])
def test_large_preactivations_saturate(silu: bool) -> None:
    x = torch.tensor([-1e30, -200.0, -80.0, 0.0, 80.0, 200.0, 1e30], device=DEVICE).view(1, -1, 1).requires_grad_()
    y = short_conv(x, torch.ones(1, 1, device=DEVICE), silu=silu)
    (dx,) = torch.autograd.grad(y.sum(), x)
    double = x.detach().double().requires_grad_()
    expected = torch.nn.functional.silu(double) if silu else double
    (gradient,) = torch.autograd.grad(expected.sum(), double)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(dx.double(), gradient, rtol=1e-5, atol=1e-30)


@runs_triton
def test_packed_sequences_give_what_each_gives_alone() -> None:
    case = Case(lengths=(3, 0, 14, 1, 10), bias=True, width=5)
    problem = make(case)
    packed = run(problem)
    totals = dict.fromkeys(("weight", "bias"), 0)
    bounds = [0, *itertools.accumulate(case.lengths)]
    for start, end in itertools.pairwise(bounds):
        inputs = dict(problem.inputs, x=problem.inputs["x"].detach()[:, start:end].requires_grad_())
        alone = run(Problem(replace(case, lengths=None), inputs, problem.dy[:, start:end], None))
        assert_close(alone["y"], packed["y"][:, start:end], case.dtype, "output", "y")
        assert_close(alone["x"], packed["x"][:, start:end], case.dtype, "gradient", "x")
        totals = {name: total + alone[name] for name, total in totals.items()}
    for name, total in totals.items():
        assert_close(total, packed[name], case.dtype, "gradient", name)


@runs_triton
@pytest.mark.parametrize("spoilt", ["x", "dy"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_in_its_sequence(spoilt: str, bad: float) -> None:
    """Also from one row of a batch to the next, which follows it in memory."""
    for case, others in (
        (Case(lengths=(6, 3, 11), bias=True), (slice(None), [*range(6), *range(9, 20)])),
        (Case(batch=3, time=9, bias=True), ([0, 2], slice(None))),
    ):
        clean, problem = run(make(case)), make(case)
        with torch.no_grad():
            tensor = problem.inputs["x"] if spoilt == "x" else problem.dy
            tensor[0 if case.lengths is not None else 1, 6:9] = bad
        results = run(problem)
        for name in ("y", "x"):
            assert torch.equal(results[name][others], clean[name][others]), name
        assert not results["weight"].isfinite().any()
        assert not results["x"][tensor.shape[0] // 2, 6:8].isfinite().any()


@runs_triton
def test_reads_a_part_of_a_projection_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = operator._kernels(torch.empty(0, device=DEVICE))
    wide = torch.randn(2, 9, 12, device=DEVICE)
    part = wide[..., 2:7]
    assert kernels._readable(part) is part
    expected = short_conv(part.contiguous(), torch.ones(5, 4, device=DEVICE))
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x, **_: x if x.is_contiguous() else pytest.fail("copied"))
    assert torch.equal(short_conv(part, torch.ones(5, 4, device=DEVICE)), expected)


@runs_triton
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of dynamo's own
@pytest.mark.parametrize(
    "case", [Case(time=3, bias=True, dtype=torch.bfloat16, weights=torch.float32), Case(lengths=(1, 0, 2))], ids=str
)
def test_operators_are_registered_properly(case: Case) -> None:
    problem = make(case)
    arguments = (problem.inputs["x"], problem.inputs["weight"], problem.inputs.get("bias"), problem.starts, case.silu)
    library.opcheck(torch.ops.m2rnn.short_conv.default, arguments)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    library.opcheck(torch.ops.m2rnn.short_conv_backward.default, (problem.dy, *detached))


@runs_triton
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_compiled_graph_gives_the_same_numbers() -> None:
    def compute(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor) -> Tensor:
        if operator._why_not(x.device) is not None:  # as the layer asks, on a GPU
            raise ValueError
        return short_conv(2 * x, weight, bias, silu=True, starts=starts) + 1

    problem = make(Case(lengths=(3, 4), bias=True))
    arguments = (*problem.inputs.values(), problem.starts)
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    expected, y = compute(*arguments), compiled(*arguments)
    assert torch.equal(y, expected)
    inputs = list(problem.inputs.values())
    pairs = (torch.autograd.grad(result, inputs, problem.dy) for result in (y, expected))
    for x, same in zip(*pairs, strict=True):
        assert torch.equal(x, same)


@runs_triton
def test_autocast_casts_x_alone() -> None:
    problem = make(Case(bias=True))
    with torch.autocast(DEVICE, torch.bfloat16):
        results = run(replace(problem, dy=problem.dy.bfloat16()))
    assert results["y"].dtype == torch.bfloat16
    expected = truth(problem)
    for name, x in results.items():
        assert name == "y" or x.dtype == torch.float32
        assert_close(x, expected[name], torch.bfloat16, "gradient", name)


@runs_triton
def test_a_second_derivative_is_refused() -> None:
    problem = make(Case(time=2))
    y = short_conv(**problem.inputs)
    (gradient,) = torch.autograd.grad(y.sum(), problem.inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


@runs_triton
def test_forward_mode_is_refused() -> None:
    """A tangent that the kernel drops would be a derivative of zero."""
    inputs = [x.detach() for x in make(Case(time=2)).inputs.values()]
    with pytest.raises(NotImplementedError, match="short_conv has no forward-mode derivative"):
        torch.func.jvp(short_conv, tuple(inputs), tuple(map(torch.ones_like, inputs)))


BAD = {
    "x of two dimensions": ({"x": torch.ones(3, 5)}, ["x", "[3, 5]", "[B, T, C]"]),
    "float64": ({"x": torch.ones(2, 3, 5, dtype=torch.float64)}, ["x", "float64", "float32"]),
    "other channels": ({"weight": torch.ones(4, 4)}, ["weight", "[4, 4]", "[5, 1 to 8]"]),
    "too wide": ({"weight": torch.ones(5, 9)}, ["weight", "[5, 9]", "1 to 8"]),
    "elsewhere": ({"weight": torch.ones(5, 4, device="meta")}, ["weight", "meta"]),
    "bias": ({"bias": torch.ones(4)}, ["bias", "[4]", "[5]"]),
    "packed with a batch": ({"starts": torch.zeros(3, dtype=torch.int32)}, ["[2, 3, 5]", "[1, T, C]"]),
    "dtype of starts": ({"starts": torch.zeros(3)}, ["starts", "float32", "int32"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_refused(what: str) -> None:
    changes, words = BAD[what]
    good = {"x": torch.ones(2, 3, 5), "weight": torch.ones(5, 4)}
    with pytest.raises(ValueError, match=words[0].replace("[", r"\[")) as caught:
        short_conv(**good | changes)
    for word in words:
        assert word in str(caught.value)


def test_where_it_cannot_run_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    why_unavailable("triton")  # cached, as it is here
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="short_conv cannot run: "):
        short_conv(torch.ones(2, 3, 5), torch.ones(5, 4))
    assert not operator.is_fast(torch.ones(2, 3, 5), torch.ones(5, 1, 4))


@on_gpu
@pytest.mark.slow
def test_more_elements_than_31_bits() -> None:
    """The last steps are those of a short sequence."""
    channels, steps, tail, width = 2048, 2**20 + 64, 64, 4
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    x = torch.randn(1, steps, channels, device=DEVICE, dtype=torch.bfloat16)
    weight, dy = torch.randn(channels, width, device=DEVICE), torch.zeros_like(x)
    dy[:, -tail:] = torch.randn(1, tail, channels, device=DEVICE, dtype=torch.bfloat16)
    results = []
    for first in (0, steps - tail - width):
        part = x[:, first:].detach().requires_grad_()
        y = short_conv(part, weight.requires_grad_(), silu=True)
        dx, dw = torch.autograd.grad(y, [part, weight], dy[:, first:])
        results.append((y.detach()[:, -tail:].clone(), dx[:, -tail:].clone(), dw))
    for big, small in zip(*results, strict=True):
        assert_close(big, small, torch.bfloat16, "output")


COMPILE = """
from m2rnn.ops.short_conv.triton import backward, forward

packed = torch.zeros(70, dtype=torch.int32)
for capability, dtype, row, channels, bias, starts, vector in (
    (90, torch.bfloat16, 2900, 1472, None, packed, "ld.global.v2.b32"),  # what the 410M model has: rows of 5,800 bytes
    (80, torch.float32, 8, 8, torch.zeros(8), None, "ld.global.v4.b32"),
):
    x = torch.zeros(1, 70, row, dtype=dtype)[..., :channels]
    weight = torch.zeros(channels, 4 if starts is not None else 2)
    y = forward(x, weight, bias, starts, True)
    backward(y, x, weight, bias, starts, True)
    for kernel in kernels[-2:]:
        assert vector in kernel.asm["ptx"], (kernel.metadata.name, "moves no vectors")
assert len(kernels) == 4, kernels
assert all(kernel.asm["cubin"] for kernel in kernels)
"""


def test_kernels_compile_ahead_of_time(tmp_path: Path) -> None:
    """For compute capabilities 9.0 and 8.0; and rows of a projection are read by vectors of 8 bytes or more."""
    compile_kernels(COMPILE, tmp_path)
