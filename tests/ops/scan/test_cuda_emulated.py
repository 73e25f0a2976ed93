"""The CUDA kernels without a GPU: small problems on an emulated one.

With a GPU they run all the tests of the other backends. What is emulated is what they compute, in the layouts of the
tensor cores; not that these round towards zero, nor the hardware's tanh.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from m2rnn.ops.backends.choice import Backends
from m2rnn.ops.scan import operator as scan
from m2rnn.ops.scan import problem as contract
from m2rnn.ops.scan.cuda import launch
from tests.ops.cases import Case, Problem, check, evaluate, make_problem, run_autograd, truth
from tests.ops.scan.emulated_gpu import H100, EmulatedGpu, Scan, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"needs {why_not()}")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    Case(time=40, key=20, value=16, dtype=BF16, gates=F32, clip=0.1),
    Case(time=70, batch=2, key=64, value=16, heads=(1, 1, 4, 4, 4), dtype=BF16, gates=F32, clip=1.0),  # the paper's
    Case(time=33, key=16, value=8, dtype=BF16, gates=F32, clip=0.1, forget="ends"),
    Case(time=35, key=33, value=32, heads=(2, 1, 4, 2, 4), dtype=BF16, gates=F32, clip=0.1),
    Case(time=34, key=5, value=33, heads=(1, 2, 1, 4, 2), dtype=BF16, gates=F32, initial=False),
    Case(time=32, key=20, value=16, dtype=BF16, gates=F32, clip=0.1, forget="slow"),  # in two parts
    Case(time=40, key=20, value=16, dtype=F16, gates=F32, clip=0.1, layout="sliced"),
    Case(time=40, key=20, value=16, dtype=F32, clip=0.1, forget="slow", initial=False),  # in three
    Case(time=33, key=17, value=24, heads=(4, 2, 1, 1, 2), dtype=F32, layout="transposed", final=False),
    Case(lengths=(10, 0, 0, 21, 40), key=20, value=16, dtype=BF16, gates=F32, clip=0.1),
    Case(lengths=(3, 40, 1), key=20, value=7, heads=(1, 3, 6, 2, 1), dtype=F32, index=torch.int32),
    Case(time=64, batch=2, key=20, value=16, dtype=BF16, gates=F32, clip=0.1, final=False),  # whole chunks
    Case(time=1, batch=2, key=20, value=16, dtype=F32),
    Case(time=0, key=20, value=16, dtype=BF16, gates=F32),
]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> EmulatedGpu:
    return EmulatedGpu(tmp_path_factory.mktemp("kernels"))


def run(problem: Problem, gpu: EmulatedGpu) -> dict[str, Tensor]:
    def scan(p: Problem) -> tuple[Tensor, Tensor | None]:
        inputs = [p.inputs.get(name) for name in ("q", "k", "v", "f", "weight", "initial_state")]
        y, final = Scan.apply(p.cu_seqlens, p.case.clip, *inputs)
        return y, final if p.case.final else None

    with gpu.in_use():
        return evaluate(problem, scan)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_match_float64(case: Case, gpu: EmulatedGpu) -> None:
    check(run(make_problem(case), gpu), truth(case), case)


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[8], replace(CASES[9], lengths=(10, 54))], ids=str)
def test_the_fake_kernel_tells_what_the_kernels_return(
    case: Case, gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes and dtypes, also of the saved states, which are as wide as the parts of a product ask for."""
    problem = make_problem(case, grads=())
    inputs = [problem.inputs.get(name) for name in ("q", "k", "v", "f", "weight", "initial_state")]
    with gpu.in_use():
        results = launch.forward(contract.Problem(*inputs, problem.cu_seqlens), True)
    monkeypatch.setattr(Backends, "choose", lambda *_: "cuda")
    fakes = scan._scan_fake(*inputs, problem.cu_seqlens, True, case.clip, None, True)
    assert [(x.shape, x.dtype) for x in fakes] == [(x.shape, x.dtype) for x in results]


def test_what_is_short_in_bfloat16_is_computed_in_two_parts() -> None:
    """Of a pack, what is short on average."""

    def parts(steps: int, offsets: Tensor | None = None, batch: int = 1) -> int:
        x = torch.empty(batch, steps, 1, 16, dtype=BF16)
        return launch._parts(contract.Problem(x, x, x, x[..., 0], x[0, :16], None, offsets))

    assert [parts(steps) for steps in (32, 33)] == [2, 1]
    assert [parts(steps, batch=2) for steps in (32, 33)] == [2, 1]
    assert [parts(steps, torch.tensor([0, 5, steps])) for steps in (64, 65)] == [2, 1]


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_state_that_slow_gates_grow_from_nothing(dtype: torch.dtype, gpu: EmulatedGpu) -> None:
    case = Case(time=40, key=20, value=16, initial=False, dtype=dtype, gates=F32)
    problem = make_problem(case)
    with torch.no_grad():
        problem.inputs["f"].fill_(1 - 2**-22)
    check(run(problem, gpu), run_autograd(problem.as_double()), case)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("multiprocessors", [1, 2])
def test_slices_and_windows_of_time(
    packed: bool, multiprocessors: int, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine heads are many for a small GPU: blocks of several heads, slices, and sums over blocks by window."""
    monkeypatch.setattr(launch, "FORWARD_SLICE", 32)
    monkeypatch.setattr(launch, "BACKWARD_SLICE", 32)
    monkeypatch.setattr(launch, "PARTIAL_BYTES", 1 << 14)
    monkeypatch.setattr(launch, "PACKED_PARTIAL_BYTES", 1 << 14)
    case = Case(time=150, key=20, value=16, heads=(1, 1, 9, 9, 9), dtype=BF16, gates=F32, clip=0.1)
    if packed:
        case = replace(case, lengths=(130, 0, 17, 60))
    gpu = EmulatedGpu(tmp_path, H100._replace(multiprocessors=multiprocessors))
    check(run(make_problem(case), gpu), truth(case), case)
    assert {name for name, blocks in gpu.launched if blocks > 9 * (1 + packed * 3)} >= {"backward"}
    assert multiprocessors == 1 or packed or ("forward", 45) in gpu.launched  # five slices


@pytest.mark.parametrize("lengths", [None, (5, 130, 0, 97, 1, 64)])
def test_from_chunk_to_chunk_by_moved_pointers(lengths: tuple[int, ...] | None, tmp_path) -> None:
    """The paper's layer where there are many heads: two of them a block, of four warps each."""
    case = Case(time=150, lengths=lengths, key=50, value=16, heads=(1, 1, 4, 4, 4), dtype=BF16, gates=F32, clip=0.1)
    gpu = EmulatedGpu(tmp_path, H100._replace(multiprocessors=1))
    check(run(make_problem(case), gpu), truth(case), case)
    expected = {("SLOTS", 2), ("WARPS", 4), ("AHEAD", 0)}
    assert any(expected <= set(macros) for name, macros in gpu.kernels if name == "backward")


@pytest.mark.parametrize("case", [CASES[1], CASES[9]], ids=str)
def test_the_order_of_the_threads_does_not_matter(case: Case, gpu: EmulatedGpu) -> None:
    """What one thread leaves for another it leaves before they meet, the same bits either way."""
    forwards = run(make_problem(case), gpu)
    gpu.backwards = True
    try:
        backwards = run(make_problem(case), gpu)
    finally:
        gpu.backwards = False
    assert all(torch.equal(x, backwards[name]) for name, x in forwards.items())


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_nan_stays_in_its_sequence(dtype: torch.dtype, gpu: EmulatedGpu) -> None:
    case = Case(lengths=(36, 5, 40), key=20, value=16, dtype=dtype, gates=F32, clip=0.1)
    problem, other = make_problem(case), make_problem(case)
    with torch.no_grad():
        problem.inputs["k"][0, 38] = torch.nan  # of the second
    found, expected = run(problem, gpu), run(other, gpu)
    for name in ("y", "q", "k", "v", "f"):
        for part in (slice(0, 36), slice(41, 81)):
            assert torch.equal(found[name][:, part], expected[name][:, part]), name
    for name in ("final_state", "initial_state"):
        assert torch.equal(found[name][::2], expected[name][::2]), name
    assert found["y"][0, 38].isnan().all()
    assert found["k"][0, 38].isnan().all()
