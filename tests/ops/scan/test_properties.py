"""Random problems for every backend: by hypothesis, which shrinks failures, and by a seeded fuzz."""

import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m2rnn.ops import m2rnn_scan
from tests.ops.cases import KIND, Case, Problem, check, fit, make_problem, random_case, run, run_autograd
from tests.tolerances import TOLERANCES, assert_close, relative_error


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n_heads = draw(st.integers(1, 4))
    divisors = [d for d in range(1, n_heads + 1) if n_heads % d == 0]
    heads = [draw(st.sampled_from(divisors)) for _ in range(5)]
    heads[draw(st.integers(0, 4))] = n_heads
    return Case(
        batch=draw(st.integers(0, 3)),
        time=draw(st.integers(0, 36)),
        key=draw(st.integers(1, 9)),
        value=draw(st.integers(1, 18)),
        heads=(heads[0], heads[1], heads[2], heads[3], heads[4]),
        lengths=draw(st.none() | st.lists(st.integers(0, 35), min_size=0, max_size=4).map(tuple)),
        initial=draw(st.booleans()),
        final=draw(st.booleans()),
        clip=draw(st.sampled_from([None, 0.01, 0.1, 1.0, 100.0])),
        forget=draw(st.sampled_from(["spread", "slow", "ends"])),
        layout=draw(st.sampled_from(["contiguous", "transposed", "sliced", "strided", "expanded"])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])),
    )


def _check(results: dict[str, Tensor], problem: Problem) -> None:
    """Within the table, or ten times what rounding the inputs to the state's dtype would change.

    The second counts in random small problems: a gradient that is one number can be a sum that cancels.
    """
    double = problem.as_double()
    expected = run_autograd(double)
    try:
        check(results, expected, problem.case)
    except AssertionError:
        eps = torch.finfo(problem.case.state_dtype).eps / 2
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for x in (*double.inputs.values(), *double.cotangents.values()):
                x.mul_(1 + eps * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device))
        rounded = run_autograd(double)
        for name, x in results.items():
            error = relative_error(x, expected[name])
            allowed = 10 * relative_error(rounded[name], expected[name])
            allowed += 2 * relative_error(expected[name].to(x.dtype), expected[name])  # denormals of float16
            if not error <= max(allowed, TOLERANCES[problem.case.dtype][KIND.get(name, "gradient")]):
                raise


@settings(max_examples=60)
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_backend_matches_float64(backend: str, device: str, case: Case, seed: int) -> None:
    problem = make_problem(fit(case, backend), seed=seed, device=device)
    _check(run(problem, backend), problem)


@settings(max_examples=25)
@given(case=cases(), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_permuting_the_batch_permutes_the_results(
    backend: str, device: str, case: Case, seed: int, data: st.DataObject
) -> None:
    """Sequences do not see each other."""
    case = fit(case, backend)
    problem = make_problem(Case(**{**vars(case), "lengths": None}), seed=seed, device=device, grads=())
    order = data.draw(st.permutations(range(case.batch)))
    inputs = {name: x if name == "weight" else x[list(order)] for name, x in problem.inputs.items()}
    y, state = m2rnn_scan(**problem.inputs, output_final_state=True, backend=backend)
    y_permuted, state_permuted = m2rnn_scan(**inputs, output_final_state=True, backend=backend)
    assert_close(y_permuted, y[list(order)], case.dtype, "output")
    assert_close(state_permuted, state[list(order)], case.dtype, "state")


@settings(max_examples=25)
@given(case=cases(), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_the_future_does_not_change_the_past(
    backend: str, device: str, case: Case, seed: int, data: st.DataObject
) -> None:
    """A prefix gives the first outputs, bit for bit where the kernel takes step after step."""
    case = fit(case, backend)
    problem = make_problem(Case(**{**vars(case), "lengths": None}), seed=seed, device=device, grads=())
    end = data.draw(st.integers(0, case.time))
    prefix = {name: x[:, :end] if name in ("q", "k", "v", "f") else x for name, x in problem.inputs.items()}
    y, _ = m2rnn_scan(**problem.inputs, backend=backend)
    y_prefix, _ = m2rnn_scan(**prefix, backend=backend)
    assert_close(y_prefix, y[:, :end], case.dtype, "output")


def test_fuzz(request: pytest.FixtureRequest, backend: str, device: str) -> None:
    """Seeded problems for --fuzz-seconds; a failure names the seed, which --fuzz-seed repeats first."""
    seed = first = request.config.getoption("--fuzz-seed")
    end = time.monotonic() + request.config.getoption("--fuzz-seconds")
    while seed == first or time.monotonic() < end:
        case = fit(random_case(random.Random(seed)), backend)
        problem = make_problem(case, seed=seed, device=device)
        try:
            _check(run(problem, backend), problem)
        except Exception as error:
            error.add_note(f"--fuzz-seed={seed}: {case}")
            raise
        seed += 1
