"""The Triton kernels without a GPU: small problems under Triton's interpreter, and compiled ahead of time.

With a GPU they run all the tests of the other backends instead.
"""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, library

from m2rnn.ops import m2rnn_scan
from m2rnn.ops.scan import triton
from m2rnn.ops.scan.problem import Problem
from tests.ops.ahead_of_time import compile_kernels
from tests.ops.cases import EMPTY, Case, check, make_problem, random_case, run, truth
from tests.ops.scan import test_integration, test_packed, test_scan
from tests.ops.triton_runs import interpreted

pytest.importorskip("triton")
# NumPy warns of the infinities that the kernels compute with
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture
def kernels():
    from m2rnn.ops.scan import triton_kernels

    return triton_kernels


@pytest.fixture
def short_chunks(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps are many chunks, as a few hundred are with the true length."""
    for module in (kernels, triton):
        monkeypatch.setattr(module, "CHUNK", 2)


CASES = [
    Case(),
    Case(time=1, batch=2, heads=(1, 1, 4, 4, 4), key=16, value=16, initial=False),
    Case(batch=2, heads=(1, 3, 3, 1, 3), dtype=torch.float64, clip=0.1, forget="ends"),
    Case(heads=(2, 1, 4, 2, 4), dtype=torch.bfloat16, clip=0.1),
    Case(heads=(1, 4, 2, 4, 1), key=17, value=33, dtype=torch.bfloat16, gates=torch.float32, final=False),
    Case(heads=(4, 2, 1, 1, 2), value=24, dtype=torch.float16, layout="sliced"),
    Case(key=5, value=1, dtype=torch.float16, gates=torch.float32, layout="expanded", forget="slow"),
    Case(key=40, value=64, heads=(1, 1, 1, 1, 1), clip=0.1),  # three blocks of rows
    Case(key=18, value=7, heads=(1, 2, 2, 2, 1), dtype=torch.float64, layout="strided"),  # two
    Case(time=1, key=300, heads=(1, 1, 3, 3, 3)),  # five blocks; more heads than are added up at once
    Case(lengths=(0, 4, 3), heads=(1, 1, 2, 2, 2), layout="transposed", clip=0.1),
    Case(lengths=(3, 0, 0, 2), heads=(1, 2, 1, 2, 2), initial=False, index=torch.int32),
]


@interpreted
@pytest.mark.parametrize("case", [*CASES, *EMPTY], ids=str)
def test_results_and_gradients_match_float64(case: Case) -> None:
    check(run(make_problem(case), "triton"), truth(replace(case, index=torch.int64)), case)


CHUNKED = [
    Case(batch=2, time=5, clip=0.1, heads=(1, 2, 2, 1, 1)),
    Case(lengths=(3, 0, 1, 5), heads=(2, 1, 1, 1, 2), initial=False, dtype=torch.float16, gates=torch.float32),
    Case(batch=2, time=5, key=18, heads=(1, 1, 1, 1, 1), dtype=torch.float64),  # two blocks of rows
]


@interpreted
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("case", CHUNKED, ids=str)
def test_many_launches_give_the_bits_of_one(case: Case, kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of time and groups of sequences, cut for want of memory, change no result; nor does running twice."""
    problem = make_problem(case)
    expected = run(problem, "triton")
    check(expected, truth(case), case)
    monkeypatch.setattr(kernels, "PARTIAL_BYTES", 1)
    for name, x in run(problem, "triton").items():
        assert torch.equal(x, expected[name]), name
    monkeypatch.setattr(kernels, "SCRATCH_BYTES", 1)
    results = run(problem, "triton")
    check(results, truth(case), case)
    for name, x in results.items():
        assert name == "weight" or torch.equal(x, expected[name]), name  # dW is a sum over sequences


@interpreted
def test_groups_that_do_not_divide_the_sequences(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(batch=3, time=3)
    problem = make_problem(case)
    *inputs, _ = problem.inputs.values()
    launches = kernels._Plan(Problem(*inputs)).launches(2, [])
    assert [(programs, first) for programs, first, *_ in launches] == [(4, 0), (2, 2)]
    expected = run(problem, "triton")
    scratch = 2 * 2 * triton.CHUNK * 16 * 16 * 4  # two sequences of two heads, in float32
    monkeypatch.setattr(kernels, "SCRATCH_BYTES", scratch)
    results = run(problem, "triton")
    check(results, truth(case), case)
    for name, x in results.items():
        assert name == "weight" or torch.equal(x, expected[name]), name


@interpreted
@pytest.mark.usefixtures("short_chunks")
def test_fuzz(request: pytest.FixtureRequest) -> None:
    """Cases of the common fuzz, those that are short enough."""
    seeds = range(request.config.getoption("--fuzz-seed"), 10_000)
    small = [
        (s, c) for s in seeds for c in [random_case(random.Random(s))] if 0 < c.steps * max(c.heads) * c.batch < 20
    ]
    for seed, case in small[:4]:
        problem = make_problem(case, seed=seed)
        check(run(problem, "triton"), truth(replace(case, index=torch.int64), seed), case)


@interpreted
@pytest.mark.parametrize("spoilt", ["q", "k", "f", "y", "final_state"])
def test_nan_stays_in_its_sequence_and_stays_nan(spoilt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, bad = (2, 0, 3, 1), 2
    case = Case(lengths=lengths, clip=0.1, heads=(1, 1, 1, 1, 1))
    clean, problem = run(make_problem(case), "triton"), make_problem(case)
    test_packed._spoil(problem, spoilt, 3, bad)  # the second of the sequence's steps
    results = run(problem, "triton")
    for name, x in results.items():
        if name in ("final_state", "initial_state"):
            assert torch.equal(x[[0, 1, 3]], clean[name][[0, 1, 3]]), name
        elif name != "weight":
            assert torch.equal(x[:, [0, 1, 5]], clean[name][:, [0, 1, 5]]), name
    if spoilt != "q":  # which only y and the gradients see
        assert results["initial_state"][bad].isnan().all()
        assert results["weight"].isnan().all()
        assert results["k"][:, 2].isnan().all()
    assert results["y"][:, 3].isnan().all() == (spoilt in ("q", "k", "f"))


@interpreted
@pytest.mark.parametrize("value", [2, 16])
def test_infinite_inputs_do_not_reach_the_padding(value: int) -> None:
    """tanh(∞) = 1: with 3 rows and 2 columns of 16 × 16 in use, no ∞ · 0 comes back from those that are not."""
    q, k, v = torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, value)
    k[0, 0, 0, 1], v[0, 1, 0, 1] = torch.inf, -torch.inf
    f, weight = torch.full((1, 2, 1), 0.5), torch.zeros(1, value, value)
    expected = m2rnn_scan(q, k, v, f, weight, backend="reference")[0]
    assert expected.isfinite().all()
    torch.testing.assert_close(m2rnn_scan(q, k, v, f, weight, backend="triton")[0], expected)


@interpreted
def test_contracts_of_every_backend() -> None:
    """Saturation, the range of gradients, inputs left alone, a final state of its own, shapes without data."""
    test_scan.test_overflowing_preactivation_saturates("triton", "cpu")
    test_scan.test_gradients_below_the_range_of_float16_count("triton", "cpu")
    test_scan.test_results_of_nothing_do_not_share_the_initial_state("triton", "cpu")
    dense, packed = Case(time=1, heads=(1, 1, 2, 1, 2), clip=0.1), Case(lengths=(1, 0, 1), initial=False, final=False)
    test_integration.test_opcheck(dense, "triton", "cpu")
    test_integration.test_shapes_without_data("fake", dense, "triton", "cpu")
    test_integration.test_shapes_without_data("fake", packed, "triton", "cpu")


@interpreted
@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("case", [Case(time=5), Case(lengths=(3, 0, 2))], ids=str)
def test_the_fake_kernel_tells_how_many_states_are_saved(case: Case) -> None:
    calls = test_integration._calls(case, "triton", "cpu")
    assert len(calls) == 2
    for func, args, kwargs in calls:
        args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        library.opcheck(func, args, kwargs, test_utils="test_faketensor")


COMPILE = """
from m2rnn.ops.scan.problem import Problem
from m2rnn.ops.scan.triton import backward, forward

for capability, dtype, key, value, offsets in (
    (90, torch.bfloat16, 64, 16, None),
    (80, torch.float16, 17, 33, torch.tensor([0, 70])),
    (80, torch.float32, 5, 8, None),
):
    q, k, v = (torch.zeros(1, 70, *shape, dtype=dtype) for shape in ((1, key), (1, key), (2, value)))
    f, weight = torch.zeros(1, 70, 2), torch.zeros(2, value, value)
    problem = Problem(q, k, v, f, weight, None, offsets, 1.0)
    y, state, saved = forward(problem, True)
    backward(problem._replace(initial_state=state), saved, y, state)
forward(problem, False)
assert len(kernels) >= 10, kernels  # forward, backward, partial sums of dq and of dk
assert all(kernel.asm["cubin"] for kernel in kernels)
"""


def test_kernels_compile_ahead_of_time(tmp_path: Path) -> None:
    """For compute capabilities 9.0 and 8.0: the interpreter takes more than the compiler does."""
    compile_kernels(COMPILE, tmp_path)
