"""RNN and GRU on every backend: outputs, states and gradients against float64, packed, split, inside PyTorch."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, library

from m2rnn.ops.vector_scan import operator as rnn
from m2rnn.ops.vector_scan import reference as rnn_reference
from m2rnn.ops.vector_scan.operator import gru_scan, rnn_scan
from tests.ops.ahead_of_time import compile_kernels
from tests.ops.cases import lay_out
from tests.ops.triton_runs import runs_triton
from tests.tolerances import TOLERANCES, assert_close, relative_error

BACKENDS = {
    "reference": [],
    "cpu": [],
    "triton": [runs_triton, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")],
}
SCANS: dict[int, Callable[..., Any]] = {1: rnn_scan, 3: gru_scan}
NAMES = {1: ["x", "weight"], 3: ["x", "x_forget", "x_reset", "weight", "weight_forget", "weight_reset"]}


@dataclass(frozen=True)
class Case:
    """One problem; ``lengths`` are those of packed sequences and replace ``batch`` and ``time``."""

    matrices: int = 3
    batch: int = 2
    time: int = 5
    heads: int = 2
    units: int = 5
    lengths: tuple[int, ...] | None = None
    initial: bool = True
    final: bool = True
    clip: float | None = None
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    weights: torch.dtype | None = None  # as dtype if None

    def __str__(self) -> str:
        packed = "+".join(map(str, self.lengths)) if self.lengths is not None else f"B{self.batch}-T{self.time}"
        rest = f"h0_{self.initial}-hT_{self.final}-clip{self.clip}-{self.layout}-{str(self.dtype)[6:]}"
        return f"{packed[:20]}-H{self.heads}-V{self.units}-{rest}"


@dataclass
class Problem:
    """Inputs by name, which require grad, and gradients of y and the final state."""

    case: Case
    inputs: dict[str, Tensor]
    cotangents: dict[str, Tensor]
    cu_seqlens: Tensor | None


def make(case: Case, device: str = "cpu", seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    rows, steps = (case.batch, case.time) if case.lengths is None else (1, sum(case.lengths))
    sequences = case.batch if case.lengths is None else len(case.lengths)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32

    def normal(dtype: torch.dtype, scale: float, *shape: int) -> Tensor:
        x = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return lay_out(x.to(dtype), case.layout).to(device)

    tensors = {}
    for name in NAMES[case.matrices]:
        if name.startswith("x"):  # gates from fast to slow, updates that saturate now and then
            tensors[name] = normal(case.dtype, 1.25 if name == "x" else 2.0, rows, steps, case.heads, case.units)
        else:
            scale = 1.2 / case.units**0.5
            tensors[name] = normal(case.weights or case.dtype, scale, case.heads, case.units, case.units)
    if case.initial:
        tensors["initial_state"] = normal(wide, 1.0, sequences, case.heads, case.units)
    cotangents = {"y": normal(case.dtype, 1.0, rows, steps, case.heads, case.units)}
    if case.final:
        cotangents["final_state"] = normal(wide, 1.0, sequences, case.heads, case.units)
    offsets = None
    if case.lengths is not None:
        offsets = torch.tensor([0, *itertools.accumulate(case.lengths)], device=device)
    return Problem(case, {name: x.requires_grad_() for name, x in tensors.items()}, cotangents, offsets)


def evaluate(problem: Problem, scan: Callable[[Problem], tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
    y, final = scan(problem)
    results = {"y": y}
    if final is not None:
        results["final_state"] = final
    wanted = {name: x for name, x in problem.inputs.items() if x.requires_grad}
    used = [name for name in problem.cotangents if results[name].requires_grad]
    gradients = torch.autograd.grad(
        [results[name] for name in used], list(wanted.values()), [problem.cotangents[name] for name in used],
        materialize_grads=True, allow_unused=True,
    )  # fmt: skip
    results |= dict(zip(wanted, gradients, strict=True))
    return {name: x.detach() for name, x in results.items()}


def run(problem: Problem, backend: str | None) -> dict[str, Tensor]:
    case, inputs = problem.case, dict(problem.inputs)
    initial = inputs.pop("initial_state", None)
    return evaluate(
        problem,
        lambda _: SCANS[case.matrices](
            **inputs, initial_state=initial, output_final_state=case.final, cu_seqlens=problem.cu_seqlens,
            state_clip=case.clip, backend=backend,
        ),
    )  # fmt: skip


def truth(problem: Problem) -> dict[str, Tensor]:
    """The definition in float64, differentiated by autograd."""
    case = problem.case
    double = replace(
        problem,
        inputs={name: x.detach().double().cpu().clone().requires_grad_() for name, x in problem.inputs.items()},
        cotangents={name: x.double().cpu() for name, x in problem.cotangents.items()},
        cu_seqlens=None if problem.cu_seqlens is None else problem.cu_seqlens.cpu(),
    )

    def scan(p: Problem) -> tuple[Tensor, Tensor | None]:
        xs, ws = ([p.inputs[n] for n in NAMES[case.matrices] if n.startswith(letter)] for letter in "xw")
        y, final = rnn_reference.scan(xs, ws, p.inputs.get("initial_state"), p.cu_seqlens, case.clip)
        return y, final if case.final else None

    return evaluate(double, scan)


def check(results: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    __tracebackhide__ = True
    assert set(results) == set(expected)
    for name, x in results.items():
        assert_close(x, expected[name], dtype, {"y": "output", "final_state": "state"}.get(name, "gradient"), name)


def _backends(*names: str) -> Any:
    return pytest.mark.parametrize("kernel", [pytest.param(name, marks=BACKENDS[name]) for name in names or BACKENDS])


def _device(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


SMALL = [
    Case(),
    Case(batch=1, time=1, heads=1, units=1, initial=False),
    Case(batch=9, time=3, units=17, clip=0.1),
    Case(time=7, units=33, final=False, layout="sliced"),
    Case(layout="transposed", dtype=torch.float64, clip=0.1),
    Case(layout="strided", dtype=torch.bfloat16),
    Case(layout="expanded", dtype=torch.float16, weights=torch.float32),
    Case(dtype=torch.bfloat16, weights=torch.float32, units=16, heads=3, clip=0.1),
    Case(lengths=(0, 4, 3, 1), clip=0.1),
    Case(lengths=(3, 0, 0, 2), initial=False, dtype=torch.bfloat16),
    Case(lengths=(2,) * 18, units=4, dtype=torch.float16),  # two blocks of each of two heads
    Case(time=0),
    Case(batch=0),
    Case(lengths=(0, 0), clip=0.1),
    Case(lengths=()),
]
LARGE = [
    Case(batch=3, time=33, heads=5, units=16, clip=0.1),
    Case(batch=20, time=40, heads=3, units=32, initial=False),
    Case(batch=5, time=70, heads=1, units=72, dtype=torch.bfloat16),
    Case(lengths=(33, 0, 70, 1, 16, 17, 15, 2, 31, 32, 64, 5), heads=2, units=8, clip=0.1),
    Case(lengths=(1,) * 40 + (50,), heads=3, units=20, dtype=torch.float16),
    Case(batch=1, time=600, heads=40, units=7, dtype=torch.float64),
    Case(batch=8, time=3, heads=37, units=16),  # units of two and of three heads
    Case(batch=150, time=2, units=3),  # more tiles than ranges of them
]


@pytest.mark.parametrize("matrices", SCANS)
@pytest.mark.parametrize("case", SMALL, ids=str)
@_backends()
def test_results_and_gradients_match_float64(case: Case, matrices: int, kernel: str) -> None:
    problem = make(replace(case, matrices=matrices), _device(kernel))
    check(run(problem, kernel), truth(problem), case.dtype)


@pytest.mark.parametrize("matrices", SCANS)
@pytest.mark.parametrize("case", LARGE, ids=str)
@_backends("cpu")
def test_many_steps_and_sequences_match_float64(case: Case, matrices: int, kernel: str) -> None:
    problem = make(replace(case, matrices=matrices))
    check(run(problem, kernel), truth(problem), case.dtype)


@pytest.mark.parametrize("matrices", SCANS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_long_sequences_match_float64(dtype: torch.dtype, matrices: int) -> None:
    """2,048 steps: states that are read back from y in 16 bits do not make errors add up."""
    problem = make(Case(matrices, batch=1, time=2048, heads=1, units=16, dtype=dtype))
    check(run(problem, "cpu"), truth(problem), dtype)


def straight_line(problem: Problem, mutation: str | None = None) -> dict[str, Tensor]:
    """The equations once more, one sequence and head at a time, by autograd; with one thing wrong or nothing."""
    case = problem.case

    def scan(p: Problem) -> tuple[Tensor, Tensor]:
        inputs = {name: x.double() for name, x in p.inputs.items()}
        gated = case.matrices == 3
        ys, finals = [], []
        for b in range(case.batch):
            h = inputs["initial_state"][b]
            for t in range(case.time):

                def product(a: Tensor, name: str) -> Tensor:
                    w = inputs[name]
                    return torch.einsum("hv,hwv->hw" if mutation == f"{name} transposed" else "hv,hvw->hw", a, w)

                x = {name: inputs[name][b, t] for name in NAMES[case.matrices] if name.startswith("x")}
                if gated:
                    f = torch.sigmoid(product(h, "weight_forget") + x["x_forget"])
                    r = torch.sigmoid(product(h, "weight_reset") + x["x_reset"])
                    if mutation == "gates swapped":
                        f, r = r, f
                    z = torch.tanh(product(r * h, "weight") + x["x"])
                    if mutation == "reset after the product":  # torch.nn.GRU's form
                        z = torch.tanh(r * product(h, "weight") + x["x"])
                    h = z + f * (h - z) if mutation != "f of the update" else h + f * (z - h)
                else:
                    h = torch.tanh(product(h, "weight") + x["x"])
                if mutation == "clamp on the whole gradient" and case.clip is not None:
                    h = _Clamp.apply(h, case.clip)
                ys.append(h)
                if mutation != "clamp missing" and case.clip is not None:
                    h = _Clamp.apply(h, case.clip)
            finals.append(h)
        return torch.stack(ys).view(case.batch, case.time, case.heads, case.units), torch.stack(finals)

    return evaluate(problem, scan)


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.clamp(-ctx.limit, ctx.limit), None


@pytest.mark.parametrize("matrices", SCANS)
def test_reference_is_the_equations(matrices: int) -> None:
    problem = make(Case(matrices, time=6, clip=0.1, dtype=torch.float64))
    check(straight_line(problem), truth(problem), torch.float64)


MUTATIONS = ["weight transposed", "clamp missing", "clamp on the whole gradient"]
GRU_MUTATIONS = ["weight_forget transposed", "weight_reset transposed", "gates swapped", "reset after the product"]


@pytest.mark.parametrize(
    ("mutation", "matrices"),
    [(m, n) for m in MUTATIONS for n in SCANS] + [(m, 3) for m in [*GRU_MUTATIONS, "f of the update"]],
)
def test_mutation_is_caught(mutation: str, matrices: int) -> None:
    """By the tolerances of each dtype, threefold."""
    for dtype in (torch.float32, torch.bfloat16):
        problem = make(Case(matrices, time=6, clip=0.1, dtype=dtype))
        expected, results = truth(problem), straight_line(problem, mutation)
        excess = max(relative_error(x, expected[name]) / TOLERANCES[dtype]["gradient"] for name, x in results.items())
        assert excess > 3, dtype


@pytest.mark.parametrize("matrices", SCANS)
@_backends("cpu", "triton")
def test_gradients_below_the_range_of_float16_count(matrices: int, kernel: str) -> None:
    """As they are of a loss that is not scaled; those of the state and the weights, in float32, can hold them."""
    problem = make(Case(matrices, time=3, dtype=torch.float16, weights=torch.float32), _device(kernel))
    problem.cotangents["y"].zero_()
    problem.cotangents["final_state"].mul_(2**-27)
    results, expected = run(problem, kernel), truth(problem)
    wide = [name for name in problem.inputs if not name.startswith("x")]
    check({name: results[name] for name in wide}, {name: expected[name] for name in wide}, torch.float16)


@pytest.mark.parametrize("matrices", SCANS)
@_backends("cpu", "triton")
def test_packed_sequences_keep_the_bits_of_each_alone(matrices: int, kernel: str) -> None:
    lengths = (3, 0, 5, 1) if kernel == "triton" else (33, 0, 50, 1)
    case = Case(matrices, lengths=lengths, clip=0.1)
    problem = make(case, _device(kernel))
    packed = run(problem, kernel)
    bounds = [0, *itertools.accumulate(lengths)]
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        alone = make(case, _device(kernel))
        alone.case, alone.cu_seqlens = replace(case, lengths=None), None
        for tensors, states in ((alone.inputs, "initial_state"), (alone.cotangents, "final_state")):
            for name, x in tensors.items():
                if name == states:
                    tensors[name] = x.detach()[n : n + 1].requires_grad_()
                elif not name.startswith("weight"):
                    tensors[name] = x.detach()[:, start:end].requires_grad_()
        for name, x in run(alone, kernel).items():
            if name in ("initial_state", "final_state"):
                assert torch.equal(x, packed[name][n : n + 1]), name
            elif not name.startswith("weight"):
                assert torch.equal(x, packed[name][:, start:end]), name


@pytest.mark.parametrize("matrices", SCANS)
@_backends("cpu", "triton")
@pytest.mark.parametrize("spoilt", ["x", "initial_state", "y", "final_state"])
def test_nan_stays_in_its_sequence_and_stays_nan(spoilt: str, matrices: int, kernel: str) -> None:
    lengths, bad = (2, 0, 3, 1), 2
    case = Case(matrices, lengths=lengths, clip=0.1, heads=1)
    clean, problem = run(make(case, _device(kernel)), kernel), make(case, _device(kernel))
    tensors = problem.inputs if spoilt in problem.inputs else problem.cotangents
    with torch.no_grad():
        if spoilt in ("initial_state", "final_state"):
            tensors[spoilt][bad] = torch.nan
        else:
            tensors[spoilt][:, 3] = torch.nan  # the second of the sequence's steps
    results = run(problem, kernel)
    for name, x in results.items():
        if name in ("final_state", "initial_state"):
            assert torch.equal(x[[0, 1, 3]], clean[name][[0, 1, 3]]), name
        elif not name.startswith("weight"):
            assert torch.equal(x[:, [0, 1, 5]], clean[name][:, [0, 1, 5]]), name
    assert results["initial_state"][bad].isnan().all()
    assert results["weight"].isnan().all()
    assert results["x"][:, 2].isnan().all()
    assert results["y"][:, 3].isnan().all() == (spoilt in ("x", "initial_state"))


@pytest.mark.parametrize("matrices", SCANS)
@_backends()
@pytest.mark.parametrize("spoilt", ["initial_state", "final_state"])
def test_nan_of_an_empty_sequence_reaches_no_weight(spoilt: str, matrices: int, kernel: str) -> None:
    case = Case(matrices, lengths=(2, 0, 3), heads=1)
    clean, problem = run(make(case, _device(kernel)), kernel), make(case, _device(kernel))
    with torch.no_grad():
        (problem.inputs if spoilt in problem.inputs else problem.cotangents)[spoilt][1] = torch.nan
    for name, x in run(problem, kernel).items():
        assert torch.equal(x[[0, 2]], clean[name][[0, 2]]) if name.endswith("state") else torch.equal(x, clean[name])


@pytest.mark.parametrize("matrices", SCANS)
def test_bits_do_not_depend_on_threads_or_repeats(matrices: int) -> None:
    cases = (Case(matrices, batch=21, time=35, heads=3, units=16), Case(matrices, lengths=(40, 0, 3, 17, 90), heads=5))
    for case in cases:
        expected = run(make(case), "cpu")
        for threads in (2, 3, 1):
            torch.set_num_threads(threads)
            for name, x in run(make(case), "cpu").items():
                assert torch.equal(x, expected[name]), f"{name} with {threads} threads"


@pytest.mark.parametrize("matrices", SCANS)
@_backends("reference", "cpu")
def test_gradients_of_some_inputs_equal_those_of_all(matrices: int, kernel: str) -> None:
    """And the loss may use y only or the final state only."""
    case = Case(matrices, time=3, clip=0.1)
    everything = run(make(case, _device(kernel)), kernel)
    for wanted in ({"x"}, {"weight"}, {"initial_state"}):
        problem = make(case, _device(kernel))
        for name, x in problem.inputs.items():
            x.requires_grad_(name in wanted)
        results = run(problem, kernel)
        assert set(results) == {"y", "final_state"} | wanted
        for name, x in results.items():
            assert torch.equal(x, everything[name]), name
    for source in ("y", "final_state"):
        problem = make(case, _device(kernel))
        for name, x in problem.cotangents.items():
            if name != source:
                x.zero_()
        expected = truth(problem)
        problem.cotangents = {source: problem.cotangents[source]}
        check(run(problem, kernel), expected, case.dtype)


def _opcheck(problem: Problem, kernel: str) -> None:
    case = problem.case
    xs, ws = ([problem.inputs[n] for n in NAMES[case.matrices] if n.startswith(letter)] for letter in "xw")
    initial = problem.inputs.get("initial_state")
    arguments = (xs, ws, initial, problem.cu_seqlens, True, case.clip, kernel)
    library.opcheck(torch.ops.m2rnn.vector_scan.default, arguments)
    with torch.no_grad():
        y, final = torch.ops.m2rnn.vector_scan(*arguments)
        detached = [[x.detach() for x in tensors] for tensors in (xs, ws)]
        initial = None if initial is None else initial.detach()
        library.opcheck(
            torch.ops.m2rnn.vector_scan_backward.default,
            (y, final, *detached, initial, y, problem.cu_seqlens, case.clip, kernel),
        )


@pytest.mark.parametrize("matrices", SCANS)
@_backends()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of dynamo's own
def test_operators_are_registered_properly(matrices: int, kernel: str) -> None:
    for case in (
        Case(matrices, time=1, heads=1, clip=0.1),
        Case(matrices, lengths=(1, 0), heads=1, initial=False, dtype=torch.bfloat16),
    ):
        _opcheck(make(case, _device(kernel)), kernel)


@pytest.mark.parametrize("narrow", ["x", "weight", "initial_state"])
@_backends("reference", "cpu")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of dynamo's own
def test_mixed_dtypes_are_registered_properly(narrow: str, kernel: str) -> None:
    """Autograd would cast a gradient of the wrong dtype; compiled code believes the fake kernel instead."""
    problem = make(Case(time=2, heads=1))
    problem.inputs[narrow] = problem.inputs[narrow].detach().bfloat16().requires_grad_()
    _opcheck(problem, kernel)


@pytest.mark.parametrize("wide", NAMES[3])
@_backends("reference", "cpu")
def test_any_input_in_float64_makes_the_state_float64(wide: str, kernel: str) -> None:
    problem = make(Case())
    problem.inputs[wide] = problem.inputs[wide].detach().double().requires_grad_()
    results, expected = run(problem, kernel), truth(problem)
    assert_close(results["final_state"], expected["final_state"], torch.float64, "state", "final_state")
    if wide.startswith("x"):  # else the backward pass has the state in y's dtype
        assert_close(results["y"], expected["y"], torch.float64, "output", "y")
        assert_close(results[wide], expected[wide], torch.float64, "gradient", wide)


@pytest.mark.parametrize("matrices", SCANS)
@_backends()
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_results_are_dense_at_any_strides(layout: str, matrices: int, kernel: str) -> None:
    """As the fake kernels say: code of torch.compile stops where strides differ."""
    for final in (True, False):
        problem = make(Case(matrices, layout=layout, final=final), _device(kernel))
        for name, x in run(problem, kernel).items():
            assert x.is_contiguous(), name


def test_a_second_derivative_is_refused() -> None:
    problem = make(Case())
    y, _ = gru_scan(**{name: x for name, x in problem.inputs.items() if name != "initial_state"})
    (gradient,) = torch.autograd.grad(y.sum(), problem.inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize("matrices", SCANS)
def test_forward_mode_is_refused(matrices: int) -> None:
    """A tangent that the kernels drop would be a derivative of zero."""
    inputs = [x.detach() for x in make(Case(matrices=matrices, initial=False)).inputs.values()]
    for i, x in enumerate(inputs):

        def scan(x: Tensor, i: int = i) -> Tensor:
            return SCANS[matrices](*inputs[:i], x, *inputs[i + 1 :])[0]

        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(scan, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("matrices", SCANS)
@_backends("reference", "cpu")
def test_autocast_casts_the_inputs_alone(matrices: int, kernel: str) -> None:
    problem = make(Case(matrices, time=20))
    with torch.autocast("cpu", torch.bfloat16):
        results = run(problem, kernel)
    assert results["y"].dtype == torch.bfloat16
    assert results["final_state"].dtype == torch.float32
    expected = truth(problem)
    assert_close(results["y"], expected["y"], torch.bfloat16, "output")
    for name, x in problem.inputs.items():
        assert results[name].dtype == x.dtype
        assert_close(results[name], expected[name], torch.bfloat16, "gradient", name)
    for name in NAMES[matrices]:
        if name.startswith("x"):
            problem.inputs[name] = problem.inputs[name].detach().bfloat16().requires_grad_()
    problem.cotangents["y"] = problem.cotangents["y"].bfloat16()
    for name, x in run(problem, kernel).items():
        assert torch.equal(results[name].to(x.dtype), x), name


@pytest.mark.parametrize("wide", ["x", "x_forget", "x_reset"])
def test_autocast_leaves_float64_alone(wide: str) -> None:
    """As PyTorch's own: who passes float64 wants its precision."""
    inputs = {name: x.detach() for name, x in make(Case()).inputs.items()}
    inputs[wide] = inputs[wide].double()
    expected, _ = gru_scan(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = gru_scan(**inputs)
    assert y.dtype == torch.float64
    assert torch.equal(y, expected)


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "x of three dimensions": ({"x": torch.ones(2, 3, 4)}, ["x", "2, 3, 4", "[B, T, heads, V]"]),
    "gate of another length": ({"x_forget": torch.ones(2, 4, 2, 5)}, ["x_forget", "2, 4, 2, 5", "2, 3, 2, 5"]),
    "fewer heads of W": ({"weight_reset": torch.ones(1, 5, 5)}, ["weight_reset", "1, 5, 5", "2, 5, 5"]),
    "integers": ({"weight": torch.ones(2, 5, 5, dtype=torch.int64)}, ["weight", "int64", "float32"]),
    "no tensor": ({"x_reset": [1.0]}, ["x_reset", "list", "tensor"]),
    "elsewhere": ({"weight": torch.ones(2, 5, 5, device="meta")}, ["weight", "meta", "cpu"]),
    "no units": ({"x": torch.ones(2, 3, 2, 0)}, ["x", "2, 3, 2, 0", "at least one"]),
    "initial state": ({"initial_state": torch.ones(3, 2, 5)}, ["initial_state", "3, 2, 5", "2, 2, 5"]),
    "packed with a batch": ({"cu_seqlens": torch.tensor([0, 3])}, ["x", "2, 3, 2, 5", "B = 1"]),
    "clip": ({"state_clip": -1.0}, ["state_clip", "-1.0", "positive"]),
    "backend": ({"backend": "cuda"}, ["backend", "cuda", "'triton'"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_refused(what: str) -> None:
    changes, words = BAD[what]
    good = {name: x.detach() for name, x in make(Case(time=3)).inputs.items()}
    gru_scan(**good)
    with pytest.raises(ValueError, match=words[0]) as caught:
        gru_scan(**good | changes)
    for word in words:
        assert word in str(caught.value)


def test_bad_offsets_are_refused() -> None:
    good = {name: x.detach() for name, x in make(Case(1, lengths=(2, 3))).inputs.items()}
    with pytest.raises(ValueError, match="rise from 0 to T = 5"):
        rnn_scan(**good, cu_seqlens=torch.tensor([0, 4, 2]))


def test_offsets_may_go_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, reading them waits for all work before."""
    inputs = {name: x.detach() for name, x in make(Case(1, lengths=(2, 3))).inputs.items()}
    monkeypatch.setattr(rnn, "validate_offsets", lambda *_: pytest.fail("read"))
    rnn_scan(**inputs, cu_seqlens=torch.tensor([0, 2, 5]), check_offsets=False)


@pytest.mark.parametrize("matrices", SCANS)
def test_the_final_state_is_returned_on_request(matrices: int) -> None:
    inputs = make(Case(matrices)).inputs
    assert SCANS[matrices](**inputs)[1] is None


COMPILE = """
from m2rnn.ops.vector_scan.problem import Problem
from m2rnn.ops.vector_scan.triton import backward, forward

for capability, dtype, units, offsets, matrices in (
    (90, torch.bfloat16, 16, None, 3),
    (80, torch.float16, 17, torch.tensor([0, 7]), 1),
    (80, torch.float32, 8, None, 1),
):
    inputs = [torch.zeros(1, 7, 2, units, dtype=dtype)] * matrices
    weights = [torch.zeros(2, units, units)] * matrices
    problem = Problem(inputs, weights, None, offsets, 1.0)
    y, state = forward(problem)
    backward(problem._replace(initial_state=state), y, y, state)
assert len(kernels) == 6, kernels
assert all(kernel.asm["cubin"] for kernel in kernels)
limit = 227 << 10
assert all(kernel.metadata.shared <= limit for kernel in kernels), [kernel.metadata.shared for kernel in kernels]
"""


def test_triton_kernels_compile_ahead_of_time(tmp_path: Path) -> None:
    """For compute capabilities 9.0 and 8.0: the interpreter takes more than the compiler does."""
    pytest.importorskip("triton")
    compile_kernels(COMPILE, tmp_path)
