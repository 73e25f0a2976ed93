"""What only a GPU has: streams, graphs, other devices, tensors of more than 2^31 elements."""

import pytest
import torch
from torch import Tensor

from m2rnn.ops import m2rnn_scan
from tests.ops.cases import Case, make_problem, run, truth
from tests.tolerances import assert_close

CASE = Case(batch=2, time=70, key=16, value=16, heads=(1, 1, 4, 4, 4), clip=1.0, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _only_on_a_gpu(backend: str) -> None:
    if backend not in ("triton", "cuda"):
        pytest.skip(f"{backend} is not a GPU's backend")


@pytest.fixture
def room() -> int:
    """Free bytes of GPU memory."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def test_another_stream_gives_the_same_bits(backend: str, device: str) -> None:
    expected = run(make_problem(CASE, device=device), backend)
    problem = make_problem(CASE, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # results of the default stream's time would not be there yet
        results = run(problem, backend)
    stream.synchronize()
    for name, x in results.items():
        assert torch.equal(x, expected[name]), name


def test_captured_in_a_graph(backend: str, device: str) -> None:
    """Forward and backward, replayed on other numbers."""
    problem = make_problem(CASE, device=device)
    inputs, cotangents = problem.inputs, problem.cotangents

    def step() -> list[Tensor]:
        y, state = m2rnn_scan(**inputs, output_final_state=True, state_clip=CASE.clip, backend=backend)
        grads = torch.autograd.grad([y, state], list(inputs.values()), list(cotangents.values()))
        return [y.detach(), state.detach(), *grads]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles what it needs
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    other = make_problem(CASE, seed=1, device=device)
    with torch.no_grad():
        for name, x in inputs.items():
            x.copy_(other.inputs[name])
        for name, x in cotangents.items():
            x.copy_(other.cotangents[name])
    graph.replay()
    for x, expected in zip(captured, step(), strict=True):
        assert torch.equal(x, expected)


def test_another_device_than_the_current(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(0):
        results = run(make_problem(CASE, device="cuda:1"), backend)
    for name, x in results.items():
        assert x.device.index == 1
        kind = {"y": "output", "final_state": "state"}.get(name, "gradient")
        assert_close(x, truth(CASE)[name], CASE.dtype, kind, name)


@pytest.mark.slow
@pytest.mark.parametrize("elements", [2**31 + 2**20, 2**32 + 2**20])
def test_strides_beyond_32_bits(elements: int, backend: str, device: str, room: int) -> None:
    """Three steps of q, k, v that lie far apart in one large tensor."""
    if room < 2 * elements + (1 << 30):
        pytest.skip(f"needs {2 * elements >> 30} GiB of GPU memory")
    case = Case(batch=1, time=3, key=16, value=16, heads=(1, 1, 2, 2, 2), dtype=torch.bfloat16, final=False)
    problem = make_problem(case, device=device, grads=())
    expected = run(problem, backend)["y"]
    memory = torch.empty(elements, dtype=torch.bfloat16, device=device)
    stride, offset = (elements // 3) // 64 * 64, 0
    for name in ("q", "k", "v"):
        x = problem.inputs[name]
        far = memory.as_strided(x.shape, (elements, stride, *x.stride()[2:]), offset)
        far.copy_(x)
        problem.inputs[name] = far
        offset += x[0, 0].numel() * 8
    assert torch.equal(run(problem, backend)["y"], expected)


@pytest.mark.slow
def test_more_elements_than_31_bits(backend: str, device: str, room: int) -> None:
    """y, v and their gradients of 2^31 elements and more; the last steps are those of a short sequence."""
    heads, steps, tail = 512, 2**18 + 64, 64
    if room < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=device)

    q, k, v = normal(1, steps, 1, 16), normal(1, steps, 1, 16), normal(1, steps, heads, 16)
    f = torch.full((1, 1, 1), 0.5, device=device).expand(1, steps, heads)
    weight = torch.eye(16, device=device).repeat(heads, 1, 1)
    dy = normal(1, tail, heads, 16)

    def last(first: int, state: Tensor | None) -> tuple[Tensor, ...]:
        inputs = [x[:, first:].detach().requires_grad_() for x in (q, k, v)]
        y, _ = m2rnn_scan(*inputs, f[:, first:], weight, initial_state=state, backend=backend)
        grads = torch.autograd.grad(y[:, -tail:], inputs, dy)
        return y[:, -tail:].detach().clone(), *(x[:, -tail:].clone() for x in grads)

    with torch.no_grad():
        _, state = m2rnn_scan(
            *(x[:, :-tail] for x in (q, k, v)), f[:, :-tail], weight, output_final_state=True, backend=backend
        )
    for x, expected in zip(last(0, None), last(steps - tail, state), strict=True):
        assert_close(x, expected, torch.bfloat16, "output")
