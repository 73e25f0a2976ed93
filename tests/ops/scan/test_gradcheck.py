"""Gradients against finite differences in float64, so that autograd itself is not the only witness."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from m2rnn.ops import m2rnn_scan
from m2rnn.ops.scan import reference
from tests.ops.cases import Case, make_problem

CASES = [
    Case(time=3, key=2, value=3, heads=(1, 1, 2, 2, 2), dtype=torch.float64),
    Case(batch=2, time=2, key=1, value=2, heads=(2, 4, 1, 2, 1), dtype=torch.float64),
    Case(key=2, value=2, lengths=(0, 2, 0, 3, 0), dtype=torch.float64),
    Case(time=4, key=2, value=2, initial=False, final=False, layout="transposed", dtype=torch.float64),
]
MANY_STEPS = Case(time=20, key=1, value=1, heads=(1, 1, 1, 1, 1), dtype=torch.float64)


def _gradcheck(case: Case, scan, device: str = "cpu") -> None:
    problem = make_problem(case, device=device)
    names = list(problem.inputs)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        y, state = scan(dict(zip(names, tensors, strict=True)), problem)
        return (y, state) if case.final else (y,)

    assert torch.autograd.gradcheck(function, tuple(problem.inputs.values()), eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_autograd_through_the_definition(case: Case) -> None:
    _gradcheck(case, lambda inputs, p: reference.scan(**inputs, cu_seqlens=p.cu_seqlens))


@pytest.mark.parametrize("case", [*CASES, MANY_STEPS], ids=str)
def test_operator(case: Case, backend: str, device: str) -> None:
    if backend == "cuda":
        pytest.skip("the CUDA kernels compute in float32")
    _gradcheck(
        case,
        lambda inputs, p: m2rnn_scan(**inputs, output_final_state=case.final, cu_seqlens=p.cu_seqlens, backend=backend),
        device,
    )


def test_a_clip_that_never_bites_changes_nothing(backend: str, device: str) -> None:
    case = Case(batch=2, time=40, clip=None)
    grads = []
    for clip in (None, 1e30, float("inf")):
        problem = make_problem(replace(case, clip=clip), device=device)
        y, state = m2rnn_scan(**problem.inputs, output_final_state=True, state_clip=clip, backend=backend)
        grads.append(torch.autograd.grad([y, state], list(problem.inputs.values()), list(problem.cotangents.values())))
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            assert torch.equal(a, b)
