"""The operator inside the rest of PyTorch: opcheck, compile, export, functional_call, checkpointing, DDP."""

import multiprocessing
import shutil
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, library, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from m2rnn.ops import m2rnn_scan, m2rnn_step
from tests.ops.cases import Case, check, fit, make_problem, run, truth
from tests.ops.layer import Layer, layer_inputs, train_half
from tests.tolerances import assert_close

CASES = [
    Case(batch=2, time=20, heads=(1, 1, 4, 2, 4), clip=0.1),
    Case(lengths=(3, 0, 29), initial=False, final=False),  # whole chunks, if not of each sequence
    Case(batch=1, time=1, dtype=torch.bfloat16, gates=torch.float32),
]


def _gradients(layer: nn.Module, output: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*layer.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(output, parameters, cotangent), strict=True))


class _Recorder(TorchDispatchMode):
    """Keeps every call of an operator of the library, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "m2rnn":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _calls(case: Case, backend: str, device: str) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    with _Recorder() as recorder:
        run(make_problem(case, device=device), backend)
    return recorder.calls


def test_operators_are_registered(backend: str, device: str) -> None:
    """Forward and backward are operators of torch.ops.m2rnn."""
    names = {func.name() for func, _, _ in _calls(CASES[0], backend, device)}
    assert any("backward" in name for name in names), names
    assert any("backward" not in name for name in names), names


def _opcheck(calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
    assert calls
    for func, args, kwargs in calls:

        def copy(x: Any, name: str = func.name()) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.detach().clone().requires_grad_(x.is_floating_point() and "backward" not in name)

        library.opcheck(func, tuple(map(copy, args)), {key: copy(x) for key, x in kwargs.items()})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case, backend: str, device: str) -> None:
    """Schema, fake kernel and autograd registration of each operator, on the arguments of real calls."""
    if backend == "reference":  # a long unrolled loop shows nothing more
        case = replace(case, time=2, lengths=None if case.lengths is None else (1, 0, 1))
    _opcheck(_calls(case, backend, device))


@pytest.mark.parametrize("narrow", ["v", "weight", "initial_state"])
def test_opcheck_of_mixed_dtypes(narrow: str, backend: str, device: str) -> None:
    """Autograd would cast a gradient of the wrong dtype; compiled code believes the fake kernel instead."""
    problem = make_problem(Case(time=2), device=device)
    problem.inputs[narrow] = problem.inputs[narrow].detach().bfloat16().requires_grad_()
    with _Recorder() as recorder:
        run(problem, backend)
    _opcheck(recorder.calls)


def test_no_states_are_saved_without_gradients(backend: str, device: str) -> None:
    with _Recorder() as recorder:
        run(make_problem(Case(time=100), device=device, grads=()), backend)
    ((func, args, kwargs),) = recorder.calls
    *_, saved = func(*args, **kwargs)
    assert saved.numel() == 0


def test_opcheck_of_the_step() -> None:
    inputs = make_problem(Case(batch=2, time=1, heads=(1, 1, 4, 2, 4)), grads=()).inputs
    with _Recorder() as recorder, torch.no_grad():
        m2rnn_step(*(inputs[n][:, 0] for n in "qkvf"), inputs["weight"], inputs["initial_state"])
    for func, args, kwargs in recorder.calls:
        library.opcheck(func, args, kwargs)


COMPILERS = ["aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    yield
    torch.compiler.reset()


def _skip_without(compiler: str) -> None:
    if compiler == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor needs a C++ compiler")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_layer_equals_eager(compiler: str, backend: str, device: str) -> None:
    """torch.compile(fullgraph=True), forward and backward, at two lengths."""
    _skip_without(compiler)
    if compiler == "inductor" and backend == "reference":
        pytest.skip("nothing in it that aot_eager does not show")
    layer = Layer().to(device)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler, dynamic=True)
    x, cotangent = layer_inputs(device=device)
    for part in (x, x[:2, :, :]):
        expected = layer(part, backend)
        output = compiled(part, backend)
        assert_close(output, expected, torch.float32, "output")
        grads = _gradients(layer, output, cotangent[: len(part)])
        for name, grad in _gradients(layer, expected, cotangent[: len(part)]).items():
            assert_close(grads[name], grad, torch.float32, "gradient", name)


def test_compiled_packed_scan_and_step_equal_eager(backend: str, device: str) -> None:
    """cu_seqlens is data: no graph break, and other lengths need no other graph."""

    def scan(inputs: dict[str, Tensor], cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        return m2rnn_scan(**inputs, cu_seqlens=cu_seqlens, output_final_state=True, state_clip=0.1, backend=backend)

    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    for lengths in ((3, 0, 31), (17, 16, 1), (0, 0, 34)):
        case = Case(lengths=lengths, clip=0.1)
        problem = make_problem(case, device=device)
        y, state = compiled(problem.inputs, problem.cu_seqlens)
        grads = torch.autograd.grad([y, state], list(problem.inputs.values()), list(problem.cotangents.values()))
        results = {"y": y, "final_state": state, **dict(zip(problem.inputs, grads, strict=True))}
        check(results, truth(case), case)

    inputs = make_problem(Case(batch=2, time=1), grads=()).inputs
    arguments = [inputs[n][:, 0] for n in "qkvf"] + [inputs["weight"], inputs["initial_state"]]
    expected = m2rnn_step(*arguments)
    for a, b in zip(torch.compile(m2rnn_step, fullgraph=True, backend="aot_eager")(*arguments), expected, strict=True):
        assert torch.equal(a, b)


def test_exported_program_equals_eager() -> None:
    """torch.export with batch and length dynamic; the program runs at other sizes."""
    layer = Layer().eval()
    x, _ = layer_inputs()
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("time", min=2, max=4096)}
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes={"x": sizes}).module()
        for part in (x, x[:3, :20]):
            assert_close(program(part), layer(part), torch.float32, "output")


@pytest.mark.parametrize("grad", [True, False])
def test_exported_program_can_be_trained_at_any_length(grad: bool) -> None:
    """As most export, with gradients wanted; and a program that was exported without them has the right ones too."""
    layer = Layer()
    x, _ = layer_inputs()
    sizes = {1: torch.export.Dim("time", min=2, max=4096)}
    with torch.set_grad_enabled(grad):
        program = torch.export.export(layer, (x,), dynamic_shapes={"x": sizes}).module()
    for part in (x, x.repeat(1, 20, 1)[:, :600]):  # beyond 512 steps the CPU's saved states are further apart
        expected = layer(part)
        output = program(part)
        assert_close(output, expected, torch.float32, "output")
        cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
        gradients = _gradients(program, output, cotangent)
        for name, gradient in _gradients(layer, expected, cotangent).items():
            assert torch.equal(gradients[name], gradient), name


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_shapes_without_data(kind: str, case: Case, backend: str, device: str) -> None:
    """Fake and meta tensors give the shapes and dtypes of the real results, forward and backward."""
    expected = run(make_problem(case, device=device), backend)
    problem = make_problem(case, device=device)
    if kind == "meta":
        problem.inputs = {name: x.detach().to("meta").requires_grad_() for name, x in problem.inputs.items()}
        problem.cotangents = {name: x.to("meta") for name, x in problem.cotangents.items()}
        problem.cu_seqlens = None if problem.cu_seqlens is None else problem.cu_seqlens.to("meta")
        results = run(problem, backend if backend in ("reference", "cpu") else None)
    else:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            problem.inputs = {n: mode.from_tensor(x.detach()).requires_grad_() for n, x in problem.inputs.items()}
            problem.cotangents = {n: mode.from_tensor(x) for n, x in problem.cotangents.items()}
            if problem.cu_seqlens is not None:
                problem.cu_seqlens = mode.from_tensor(problem.cu_seqlens)
            results = run(problem, backend)
    for name, x in expected.items():
        assert results[name].shape == x.shape, name
        assert results[name].dtype == x.dtype, name


def test_functional_call_uses_the_given_parameters(backend: str, device: str) -> None:
    """torch.func.functional_call computes with the parameters it is given, and differentiates by them."""
    layer, (x, cotangent) = Layer().to(device), layer_inputs(device=device)
    other = {name: (1.5 * p).detach().requires_grad_() for name, p in layer.named_parameters()}
    output = torch.func.functional_call(layer, other, (x, backend))
    grads = torch.autograd.grad(output, list(other.values()), cotangent)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(1.5)
    expected = layer(x, backend)
    assert torch.equal(output, expected)
    for (name, grad), mine in zip(_gradients(layer, expected, cotangent).items(), grads, strict=True):
        assert torch.equal(mine, grad), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool, backend: str, device: str) -> None:
    layer, (x, cotangent) = Layer().to(device), layer_inputs(device=device)
    x.requires_grad_()
    expected = _gradients(layer, layer(x, backend), cotangent)
    (d_x,) = torch.autograd.grad(layer(x, backend), x, cotangent)
    output = checkpoint(layer, x, backend, use_reentrant=reentrant)
    output.backward(cotangent)
    assert torch.equal(x.grad, d_x)
    for name, p in layer.named_parameters():
        assert torch.equal(p.grad, expected[name]), name


def test_autocast_stays_in_the_table(backend: str, device: str) -> None:
    """Float32 inputs may be rounded to bfloat16 once; the state stays float32, gradients as their inputs."""
    case = Case(batch=2, time=300, heads=(1, 1, 4, 4, 4), forget="slow")
    problem = make_problem(case, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        results = run(problem, backend)
    assert results["final_state"].dtype == torch.float32
    for name, x in problem.inputs.items():
        assert results[name].dtype == x.dtype, name
    for name, kind in (("y", "output"), ("final_state", "state"), ("v", "gradient"), ("weight", "gradient")):
        assert_close(results[name], truth(case)[name], torch.bfloat16, kind, name)


def test_autocast_with_mixed_inputs(backend: str, device: str) -> None:
    """What a layer under autocast passes: bfloat16 projections, float32 gates and weight."""
    case = Case(batch=2, time=100, forget="slow", dtype=torch.bfloat16, gates=torch.float32)
    with torch.autocast(device, dtype=torch.bfloat16):
        results = run(make_problem(case, device=device), backend)
    assert results["y"].dtype == torch.bfloat16
    check(results, truth(case), case)


def test_autocast_rounds_q_k_and_v_and_nothing_else(backend: str, device: str) -> None:
    case = Case(time=20, clip=0.1)
    wide, narrow = make_problem(case, device=device), make_problem(case, device=device)
    for name in "qkv":
        narrow.inputs[name] = narrow.inputs[name].detach().bfloat16().requires_grad_()
    expected = run(narrow, backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = run(wide, backend)
    for name, x in expected.items():
        assert torch.equal(found[name].to(x.dtype), x), name


@pytest.mark.parametrize("wide", ["q", "k", "v"])
def test_autocast_leaves_float64_alone(wide: str, backend: str, device: str) -> None:
    """As PyTorch's own: who passes float64 wants its precision."""
    if backend == "cuda":
        pytest.skip("not in float64")
    inputs = make_problem(Case(time=9), device=device, grads=()).inputs
    inputs[wide] = inputs[wide].double()
    expected, _ = m2rnn_scan(**inputs, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, _ = m2rnn_scan(**inputs, backend=backend)
    assert y.dtype == torch.float64
    assert torch.equal(y, expected)


def test_changing_an_input_before_backward_is_an_error(backend: str, device: str) -> None:
    """Saved tensors are guarded: no silently wrong gradient."""
    inputs = {name: x.detach().clone() for name, x in make_problem(Case(time=9), device=device).inputs.items()}
    inputs["k"].requires_grad_()
    y, _ = m2rnn_scan(**inputs, backend=backend)
    inputs["v"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_right_or_refused(backend: str, device: str) -> None:
    """The backward is not differentiable itself, so that asking for it must not return a wrong number."""
    problem = make_problem(fit(Case(time=3, dtype=torch.float64), backend), device=device)
    inputs = list(problem.inputs.values())

    def penalty() -> Tensor:
        y, _ = m2rnn_scan(**problem.inputs, backend=backend)
        (grad,) = torch.autograd.grad(y, [problem.inputs["k"]], problem.cotangents["y"], create_graph=True)
        assert grad.requires_grad, "the gradient looks like a constant"
        return (grad**2).sum()

    with pytest.raises(RuntimeError, match=r"(?i)autograd|differentiat|derivative|backward"):
        torch.autograd.grad(penalty(), inputs, allow_unused=True)


@pytest.mark.parametrize("name", ["q", "k", "v", "f", "weight", "initial_state"])
def test_forward_mode_is_refused(name: str, backend: str, device: str) -> None:
    """A tangent that the kernels drop would be a derivative of zero."""
    inputs = make_problem(Case(batch=2, time=1), device=device, grads=()).inputs
    tangent = torch.ones_like(inputs[name])

    def scan(x: Tensor) -> Tensor:
        return m2rnn_scan(**{**inputs, name: x}, backend=backend)[0]

    def step(x: Tensor) -> Tensor:
        changed = {**inputs, name: x}
        qkvf = (changed[n][:, 0] for n in "qkvf")
        return m2rnn_step(*qkvf, changed["weight"], changed["initial_state"], backend=backend)[0]

    for operator in (scan, step):
        with pytest.raises(NotImplementedError, match="m2rnn_scan has no forward-mode derivative"):
            torch.func.jvp(operator, (inputs[name],), (tangent,))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jacfwd(scan)(inputs[name])


def test_threads_that_share_the_operator_do_not_disturb_each_other(backend: str, device: str) -> None:
    torch.set_num_threads(2)
    case = Case(batch=3, time=40, heads=(1, 1, 4, 4, 4))
    expected = run(make_problem(case, device=device), backend)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(3):
            results = run(make_problem(case, device=device), backend)
            wrong.extend(name for name, x in results.items() if not torch.equal(x, expected[name]))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "deadlock"
    assert not wrong, wrong


def _outputs(case: Case) -> list[Tensor]:
    """Without gradients: PyTorch's own backward refuses to run in a forked child where it has a GPU's threads."""
    torch.set_num_threads(2)
    with torch.no_grad():
        y, state = m2rnn_scan(**make_problem(case).inputs, output_final_state=True, backend="cpu")
    return [y, state]


def _in_child(queue: Any, case: Case) -> None:
    queue.put([x.numpy() for x in _outputs(case)])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.parametrize("pool", [False, True])
def test_works_in_a_forked_child_after_use_in_the_parent(
    pool: bool, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads do not survive a fork: the child must start its own, not wait for the parent's."""
    if backend != "cpu":
        pytest.skip("the backend keeps no threads of its own")
    if pool:  # as where PyTorch does not run on GNU OpenMP
        monkeypatch.setattr("m2rnn.ops.backends.threads._openmp", lambda: None)
    case = Case(batch=3, time=40, heads=(1, 1, 4, 4, 4))
    expected = _outputs(case)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns about fork beside threads
        child = context.Process(target=_in_child, args=(queue, case), daemon=True)
        child.start()
    results = queue.get(timeout=60)
    child.join(timeout=60)
    assert child.exitcode == 0
    for result, x in zip(results, expected, strict=True):
        assert torch.equal(torch.from_numpy(result), x)


def test_ddp_gradients_equal_one_process(tmp_path: Path, backend: str, device: str) -> None:
    """Two gloo processes with half the batch each; DDP averages, hence the factor."""
    if not torch.distributed.is_available() or device != "cpu":
        pytest.skip("needs torch.distributed on the CPU")
    if backend == "reference":
        pytest.skip("one backend is enough: the processes take seconds to start")
    torch.multiprocessing.spawn(train_half, args=(str(tmp_path), backend), nprocs=2)
    layer, (x, cotangent) = Layer(), layer_inputs()
    expected = _gradients(layer, layer(x, backend), cotangent)
    grads = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, grad in expected.items():
        assert torch.equal(grads[0][name], grads[1][name]), name
        assert_close(2 * grads[0][name], grad, torch.float32, "gradient", name)
