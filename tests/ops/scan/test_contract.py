"""A new backend is one file and one line in the table: a toy passes the operator's own tests."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, library

from m2rnn.ops import available_backends, m2rnn_scan
from m2rnn.ops.scan.problem import BACKENDS, Problem
from tests.ops.cases import EMPTY, Case, check, make_problem, run, truth
from tests.ops.scan import test_integration
from tests.ops.scan.test_triton import CASES


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS.modules, "toy", "tests.ops.scan.toy_backend")  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [*CASES, *EMPTY], ids=str)
def test_its_results_and_gradients_match_float64(case: Case) -> None:
    check(run(make_problem(case), "toy"), truth(replace(case, index=torch.int64)), case)


@pytest.mark.parametrize("case", [Case(time=5), Case(lengths=(3, 0, 2))], ids=str)
def test_its_operators_pass_pytorch_checks(case: Case) -> None:
    """The fake kernel among them: it asks the backend what it saves."""
    calls = test_integration._calls(case, "toy", "cpu")
    assert len(calls) == 2
    for func, args, kwargs in calls:
        args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        library.opcheck(func, args, kwargs, test_utils=("test_schema", "test_faketensor"))


def test_it_runs_in_compiled_programs() -> None:
    inputs = make_problem(Case(time=5)).inputs
    arguments = [inputs[name] for name in ("q", "k", "v", "f", "weight")]

    def loss(*tensors: Tensor) -> Tensor:
        return m2rnn_scan(*tensors, backend="toy")[0].square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(*arguments), arguments)
    for found, gradient in zip(torch.autograd.grad(compiled(*arguments), arguments), expected, strict=True):
        assert torch.equal(found, gradient)


def test_its_name_and_its_reasons_are_heard() -> None:
    assert available_backends()["toy"] is None
    wide = torch.zeros(1, 2, 1, 100)
    with pytest.raises(ValueError, match="backend='toy' cannot run: V is 100, and the toy takes up to 99"):
        m2rnn_scan(wide, wide, wide, wide[..., 0], torch.zeros(1, 100, 100), backend="toy")
    with pytest.raises(ValueError, match="'toi', expected one of 'reference', 'cpu', 'triton', 'cuda', 'toy' or None"):
        m2rnn_scan(wide, wide, wide, wide[..., 0], torch.zeros(1, 100, 100), backend="toi")


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("case", [Case(time=70, batch=2), Case(time=0), Case(lengths=(3, 0, 60, 7))], ids=str)
def test_what_is_saved_has_the_layout_that_is_announced(name: str, case: Case) -> None:
    problem = make_problem(case, grads=())
    inputs = [problem.inputs.get(name) for name in ("q", "k", "v", "f", "weight", "initial_state")]
    asked = Problem(*inputs, problem.cu_seqlens)
    module = BACKENDS.module(name)
    if module.why_not(asked) is None and available_backends()[name] is None:
        saved, announced = module.forward(asked, True)[2], module.saved_like(asked)
        assert (saved.shape, saved.dtype) == (announced.shape, announced.dtype)
        assert module.forward(asked, False)[2] is None
