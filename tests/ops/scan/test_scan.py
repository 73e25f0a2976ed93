"""Every backend computes the recurrence: outputs, states, all gradients, against float64 within one table."""

from dataclasses import replace

import pytest
import torch

from m2rnn.ops import m2rnn_scan
from tests.ops.cases import (
    EMPTY,
    GRADIENTS,
    KIND,
    STANDARD,
    Case,
    check,
    make_long,
    make_problem,
    run,
    run_autograd,
    truth,
    truth_of_long,
)
from tests.tolerances import TOLERANCES, assert_close


@pytest.mark.parametrize("case", [*STANDARD, *EMPTY], ids=str)
def test_results_and_gradients_match_float64(case: Case, backend: str, device: str) -> None:
    results = run(make_problem(case, device=device), backend)
    assert set(results) == set(truth(case))
    check(results, truth(case), case)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_long_sequences_match_float64(dtype: torch.dtype, backend: str, device: str) -> None:
    """4096 steps, f near 1."""
    if backend == "reference" and dtype != torch.float32:
        pytest.skip("one dtype of the slow loop is enough at this length")
    problem = make_long(dtype, device=device)
    check(run(problem, backend), truth_of_long(), problem.case)


@pytest.mark.parametrize("case", [c for c in STANDARD if c.dtype != torch.float32][:40], ids=str)
def test_hand_written_backward_matches_autograd(case: Case) -> None:
    """The reference backend's gradients against autograd through the definition, both in float64."""
    case64 = replace(case, dtype=torch.float64, gates=None)
    results, expected = run(make_problem(case64), "reference"), truth(case64)
    for name, x in results.items():
        assert_close(x, expected[name], torch.float64, KIND.get(name, "gradient"), name)


DTYPES = [
    Case(dtype=torch.float64),
    Case(dtype=torch.float32),
    Case(dtype=torch.bfloat16),
    Case(dtype=torch.float16),
    Case(dtype=torch.bfloat16, gates=torch.float32),
]


@pytest.mark.parametrize("case", DTYPES, ids=str)
def test_dtypes_of_results(case: Case, backend: str, device: str) -> None:
    """y as q, k, v; states float32, or float64 for float64; a gradient as its input."""
    problem = make_problem(case, device=device)
    for name, x in run(problem, backend).items():
        expected = {"y": case.dtype, "final_state": case.state_dtype}.get(name) or problem.inputs[name].dtype
        assert x.dtype == expected, f"{name} is {x.dtype}"


@pytest.mark.parametrize("wide", ["q", "k", "v", "f", "weight"])
def test_any_input_in_float64_makes_the_state_float64(wide: str, backend: str, device: str) -> None:
    if backend == "cuda":
        pytest.skip("not in float64")
    problem = make_problem(Case(time=20, clip=0.1), device=device)
    problem.inputs[wide] = problem.inputs[wide].detach().double().requires_grad_()
    results, expected = run(problem, backend), run_autograd(problem.as_double())
    for name in ("final_state", wide):
        assert_close(results[name], expected[name], torch.float64, KIND.get(name, "gradient"), name)


SUBSETS = [
    ("q",),
    ("k",),
    ("v",),
    ("f",),
    ("weight",),
    ("initial_state",),
    ("k", "f"),
    ("q", "v", "weight"),
    ("f", "weight", "initial_state"),
]


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
def test_gradients_of_some_inputs_equal_those_of_all(wanted: tuple[str, ...], backend: str, device: str) -> None:
    for lengths in (None, (3, 0, 33)):
        case = Case(batch=2, time=36, lengths=lengths, clip=0.1)
        everything = run(make_problem(case, device=device), backend)
        some = run(make_problem(case, device=device, grads=wanted), backend)
        assert set(some) == {"y", "final_state", *wanted}
        for name, x in some.items():
            assert torch.equal(x, everything[name]), f"{name} differs"


@pytest.mark.parametrize("source", ["y", "final_state"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_gradient_of_one_result_alone(source: str, clip: float | None, backend: str, device: str) -> None:
    """The loss may use y only or the final state only."""
    problem = make_problem(Case(batch=2, time=34, clip=clip), device=device)
    double = problem.as_double()
    problem.cotangents = {source: problem.cotangents[source]}
    for name in ("y", "final_state"):
        if name != source:
            double.cotangents[name].zero_()
    results = run(problem, backend)
    check(results, run_autograd(double), problem.case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("f", [0.1, -0.5])
def test_clip_of_a_gradient_that_grows(f: float, dtype: torch.dtype, backend: str, device: str) -> None:
    """From far below the limit to far above it within a few steps, wherever these lie between saved states."""
    for steps in range(33, 41):
        problem = make_problem(
            Case(time=steps, key=20, value=16, clip=1.0, dtype=dtype, gates=torch.float32, final=False), device=device
        )
        with torch.no_grad():
            problem.inputs["weight"].copy_(2.5 * torch.eye(16))
            problem.inputs["f"].fill_(f)
            problem.inputs["k"].zero_()  # so that the state is zero, and c grows by f + 2.5 (1 - f) a step
            problem.inputs["initial_state"].zero_()
        problem.cotangents["y"][:, :-1] = 0
        problem.cotangents["y"] *= 1e-3
        check(run(problem, backend), run_autograd(problem.as_double()), problem.case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [40, 70])
def test_a_state_that_slow_gates_grow_from_nothing(steps: int, dtype: torch.dtype, backend: str, device: str) -> None:
    """Less than 2e-5 of Z: f (H - Z) + Z, where states are computed again, would lose bits that bfloat16 has."""
    case = Case(time=steps, key=20, value=16, initial=False, dtype=dtype, gates=torch.float32)
    problem = make_problem(case, device=device)
    with torch.no_grad():
        problem.inputs["f"].fill_(1 - 2**-22)
    check(run(problem, backend), run_autograd(problem.as_double()), case)


def test_gradients_below_the_range_of_float16_count(backend: str, device: str) -> None:
    """As they are of a loss that is not scaled; those of the state, the gates and W, in float32, can hold them."""
    case = Case(time=3, dtype=torch.float16, gates=torch.float32)
    problem = make_problem(case, device=device)
    problem.cotangents["y"].zero_()
    problem.cotangents["final_state"].mul_(2**-27)
    results, expected = run(problem, backend), run_autograd(problem.as_double())
    check({name: results[name] for name in ("f", "weight", "initial_state")}, expected, case)


@pytest.mark.parametrize("scale", [1.0, 1e4, 3e7])
def test_clip_with_large_weights(scale: float, backend: str, device: str) -> None:
    """The clip acts at the first step back, however large the factor by which W would let a gradient grow."""
    case = Case(time=33, key=16, value=8, heads=(1, 1, 1, 1, 1), clip=1.0, dtype=torch.bfloat16, gates=torch.float32)
    problem = make_problem(case, device=device)
    with torch.no_grad():
        problem.inputs["weight"].copy_(scale * torch.eye(8))
        problem.inputs["f"].fill_(0.99)
        problem.inputs["initial_state"].zero_()
    problem.cotangents["y"] *= 1e-3
    problem.cotangents["final_state"] *= 10
    results, expected = run(problem, backend), run_autograd(problem.as_double())
    torch.testing.assert_close(results["f"][:, -1].double(), expected["f"][:, -1], rtol=0.05, atol=0.05)


def test_no_gradient_is_tracked_when_none_is_wanted(backend: str, device: str) -> None:
    case = Case(batch=2, time=33)
    inputs = make_problem(case, device=device, grads=()).inputs
    y, state = m2rnn_scan(**inputs, output_final_state=True, backend=backend)
    assert not y.requires_grad
    assert not state.requires_grad
    check({"y": y, "final_state": state}, truth(case), case)
    tracked = make_problem(case, device=device).inputs
    with torch.no_grad():
        y, state = m2rnn_scan(**tracked, output_final_state=True, backend=backend)
    assert not y.requires_grad
    assert not state.requires_grad
    check({"y": y, "final_state": state}, truth(case), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key", [3, 12])
def test_memory_beside_the_channels_is_not_read(key: int, dtype: torch.dtype, backend: str, device: str) -> None:
    """The first channels of rows that start at addresses which vector loads can take."""
    case = Case(time=40, key=key, value=key, heads=(1, 1, 2, 2, 2), dtype=dtype)
    problem = make_problem(case, device=device)
    for name in ("q", "k", "v"):
        x = problem.inputs[name].detach()
        wide = x.new_full((*x.shape[:-1], 16), torch.nan)
        wide[..., :key] = x
        problem.inputs[name] = wide[..., :key].requires_grad_()
    check(run(problem, backend), truth(case), case)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_inputs_are_left_alone(layout: str, backend: str, device: str) -> None:
    """Forward and backward write into none of their arguments, and no result shares memory with one."""
    problem = make_problem(Case(batch=2, time=33, layout=layout, clip=0.1), device=device)
    tensors = {**problem.inputs, **{f"gradient of {name}": x for name, x in problem.cotangents.items()}}
    before = {name: x.detach().clone() for name, x in tensors.items()}
    results = run(problem, backend)
    for name, x in tensors.items():
        assert torch.equal(x, before[name]), f"{name} was overwritten"
    for x in results.values():
        x.fill_(torch.nan)
    for name, x in tensors.items():
        assert torch.equal(x, before[name]), f"a result shares the memory of {name}"


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_results_are_dense_at_any_strides(layout: str, final: bool, backend: str, device: str) -> None:
    """As the fake kernels say: code of torch.compile stops where strides differ."""
    problem = make_problem(Case(batch=2, time=6, heads=(2, 2, 2, 2, 2), layout=layout, final=final), device=device)
    for name, x in run(problem, backend).items():
        assert x.is_contiguous(), name


def test_results_of_nothing_do_not_share_the_initial_state(backend: str, device: str) -> None:
    """With no steps the final state equals the initial one, but is its own tensor."""
    problem = make_problem(Case(time=0, batch=2), device=device)
    results = run(problem, backend)
    expected = problem.inputs["initial_state"].detach().clone()
    assert torch.equal(results["final_state"], expected)
    results["final_state"].fill_(torch.nan)
    assert torch.equal(problem.inputs["initial_state"], expected)


def test_backward_twice_through_one_graph_gives_the_same(backend: str, device: str) -> None:
    problem = make_problem(Case(batch=2, time=40), device=device)
    y, state = m2rnn_scan(**problem.inputs, output_final_state=True, backend=backend)
    arguments = (
        [y, state],
        list(problem.inputs.values()),
        [problem.cotangents["y"], problem.cotangents["final_state"]],
    )
    first = torch.autograd.grad(*arguments, retain_graph=True)
    second = torch.autograd.grad(*arguments)
    for name, a, b in zip(GRADIENTS, first, second, strict=True):
        assert torch.equal(a, b), f"d{name} differs"


def test_state_split_in_two_calls_equals_one(backend: str, device: str) -> None:
    """The final state of the first part, given to the second, continues it; its gradient flows back."""
    case = Case(batch=2, time=70)
    problem = make_problem(case, device=device)
    inputs = dict(problem.inputs)
    initial, weight = inputs.pop("initial_state"), inputs.pop("weight")
    halves, state = [], initial
    for part in (slice(None, 37), slice(37, None)):
        y, state = m2rnn_scan(
            **{name: x[:, part] for name, x in inputs.items()},
            weight=weight,
            initial_state=state,
            output_final_state=True,
            backend=backend,
        )
        halves.append(y)
    grads = torch.autograd.grad(
        [torch.cat(halves, 1), state],
        list(problem.inputs.values()),
        [problem.cotangents["y"], problem.cotangents["final_state"]],
    )
    results = {
        "y": torch.cat(halves, 1),
        "final_state": state,
        **dict(zip(problem.inputs, grads, strict=True)),
    }
    check(results, truth(case), case)


def test_overflowing_preactivation_saturates(backend: str, device: str) -> None:
    """k vᵀ beyond float32 gives tanh = ±1, not NaN."""
    huge = torch.full((1, 3, 1, 1), 1e30, device=device)
    v = torch.tensor([1e30, -1e30, 1e30], device=device).reshape(1, 3, 1, 1)
    f, weight = torch.full((1, 3, 1), 0.5, device=device), torch.ones(1, 1, 1, device=device)
    y, _ = m2rnn_scan(torch.ones_like(huge), huge, v, f, weight, backend=backend)
    assert y.flatten().tolist() == [0.5, -0.25, 0.375]


@pytest.mark.parametrize("value", [3, 16])
@pytest.mark.parametrize("name", ["k", "v"])
def test_an_infinite_input_saturates(name: str, value: int, backend: str, device: str) -> None:
    """And stays out of what it does not touch: in the kernels' padding 0 · inf is NaN."""
    if backend in ("triton", "cuda"):
        pytest.skip("matrix products of a GPU take the padding too")
    results = []
    for kernel in (backend, "reference"):
        problem = make_problem(Case(time=40, key=3, value=value, clip=0.1), device=device)
        with torch.no_grad():
            problem.inputs[name][0, 20, 0, 1] = torch.inf
        results.append(run(problem, kernel))
    found, expected = results
    assert expected["y"].isfinite().all()
    for key in found if name == "v" else ("y", "final_state"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(("dtype", "dropped"), [(torch.bfloat16, 16), (torch.float16, 13)])
def test_y_is_rounded_to_nearest_even(dtype: torch.dtype, dropped: int, backend: str, device: str) -> None:
    """With q and f 1, y is the state, here halfway between two numbers of y's dtype, or next to that, or any NaN."""
    if backend in ("triton", "cuda"):
        pytest.skip("y is a matrix product of parts there")
    case = Case(time=1, key=1, value=67, heads=(1, 1, 1, 1, 1), dtype=dtype)
    inputs = make_problem(case, device=device, grads=()).inputs
    inputs["q"].fill_(1)
    inputs["f"].fill_(1)
    bits = inputs["initial_state"].view(torch.int32)
    halfway = (bits >> dropped << dropped) + (1 << dropped - 1)
    for x in (halfway - 1, halfway, halfway + 1, torch.full_like(bits, 0x7FFFFFFF)):
        inputs["initial_state"] = x.view(torch.float32)
        y, _ = m2rnn_scan(**inputs, backend=backend)
        torch.testing.assert_close(y.view(67), x.view(torch.float32).view(67).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_automatic_choice_of_backend_computes_the_same() -> None:
    case = Case(batch=2, time=33, heads=(1, 1, 4, 4, 4))
    check(run(make_problem(case), None), truth(case), case)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_cu_seqlens_of_either_integer_type(index: torch.dtype, backend: str, device: str) -> None:
    case = Case(lengths=(5, 0, 33), index=index)
    check(run(make_problem(case, device=device), backend), truth(replace(case, index=torch.int64)), case)
