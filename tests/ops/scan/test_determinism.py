"""The same bits every time: on repeat, and for any number of threads."""

from collections.abc import Iterator

import pytest
import torch

from m2rnn.ops import m2rnn_step
from tests.ops.cases import Case, make_problem, run

CASES = [
    Case(batch=5, time=67, key=16, value=16, heads=(1, 1, 8, 8, 8), clip=1.0),
    Case(batch=1, time=130, key=64, value=16, heads=(1, 1, 2, 2, 2)),
    Case(batch=2, time=33, key=17, value=33, heads=(2, 3, 6, 1, 6), dtype=torch.bfloat16),
    Case(lengths=(3, 0, 65, 1, 31), key=7, value=8, heads=(4, 2, 4, 2, 1)),
    Case(batch=1, time=300, key=5, value=8, heads=(1, 3, 6, 2, 1)),  # units of 2 heads, of which f has one for 3
]


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_thread_count_does_not_change_the_bits(case: Case, backend: str, device: str) -> None:
    if backend == "reference":
        pytest.skip("PyTorch's own matrix products may differ with the thread count")
    torch.set_num_threads(1)
    expected = run(make_problem(case, device=device), backend)
    for threads in (2, 3, 1):
        torch.set_num_threads(threads)
        for name, x in run(make_problem(case, device=device), backend).items():
            assert torch.equal(x, expected[name]), f"{name} differs with {threads} threads"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_repeat_does_not_change_the_bits(case: Case, backend: str, device: str) -> None:
    torch.set_num_threads(1 if backend == "reference" else 2)
    expected = run(make_problem(case, device=device), backend)
    for _ in range(3):
        for name, x in run(make_problem(case, device=device), backend).items():
            assert torch.equal(x, expected[name]), f"{name} differs on repeat"


def test_a_sequence_keeps_its_bits_beside_others(backend: str, device: str) -> None:
    """An output does not depend on what else is in the batch."""
    if backend == "reference":
        pytest.skip("PyTorch's own matrix products may differ with the batch size")
    problem = make_problem(Case(batch=3, time=40, heads=(1, 1, 4, 4, 4)), device=device)
    expected = run(problem, backend)
    alone = make_problem(problem.case, device=device)
    for name in ("q", "k", "v", "f", "initial_state"):
        alone.inputs[name] = alone.inputs[name].detach()[1:2].requires_grad_()
    alone.cotangents = {name: x[1:2] for name, x in alone.cotangents.items()}
    for name, x in run(alone, backend).items():
        if name != "weight":
            assert torch.equal(x, expected[name][1:2]), f"{name} differs"


def test_step_keeps_its_bits_for_any_thread_count() -> None:
    inputs = make_problem(Case(batch=7, time=1, key=16, value=16, heads=(1, 1, 8, 8, 8)), grads=()).inputs
    arguments = [inputs[n][:, 0] for n in "qkvf"] + [inputs["weight"], inputs["initial_state"]]
    expected = m2rnn_step(*arguments)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for a, b in zip(m2rnn_step(*arguments), expected, strict=True):
            assert torch.equal(a, b)
