"""Decoding one token at a time gives what the scan gives."""

import pytest
import torch
from torch import Tensor

from m2rnn.ops import m2rnn_scan, m2rnn_step
from tests.ops.cases import Case, check, lay_out, make_problem, truth
from tests.tolerances import assert_close


def _steps(inputs: dict[str, Tensor], layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    state, ys = lay_out(inputs["initial_state"].detach(), layout), []
    for t in range(inputs["q"].shape[1]):
        tokens = [lay_out(inputs[name][:, t].detach(), layout) for name in ("q", "k", "v", "f")]
        y, state = m2rnn_step(*tokens, lay_out(inputs["weight"].detach(), layout), state)
        ys.append(y)
    return torch.stack(ys, 1), state


CASES = [
    Case(batch=2, time=9, key=5, value=7),
    Case(batch=3, time=9, key=16, value=32, heads=(1, 1, 4, 4, 4)),
    Case(batch=1, time=9, key=1, value=1, heads=(4, 2, 1, 4, 2)),
    Case(batch=2, time=9, key=17, value=33, heads=(2, 1, 6, 3, 1)),
    Case(batch=2, time=9, key=3, value=8, dtype=torch.float64),
    Case(batch=2, time=9, key=3, value=8, dtype=torch.bfloat16, gates=torch.float32),
    Case(batch=2, time=9, key=3, value=8, dtype=torch.bfloat16, forget="ends"),
    Case(batch=2, time=9, key=3, value=8, dtype=torch.float16),
]


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "strided"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_match_scan(case: Case, layout: str) -> None:
    """Against float64, and with the scan's dtypes."""
    y, state = _steps(make_problem(case, grads=()).inputs, layout)
    assert (y.dtype, state.dtype) == (case.dtype, case.state_dtype)
    check({"y": y, "final_state": state}, truth(case), case)


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_step_on_other_strides(layout: str) -> None:
    """The numbers depend on the elements, not on where they lie."""
    inputs = make_problem(Case(batch=2, time=1, heads=(2, 1, 4, 4, 2), layout=layout), grads=()).inputs
    arguments = [inputs[name][:, 0] for name in ("q", "k", "v", "f")] + [
        inputs["weight"],
        inputs["initial_state"],
    ]
    y, state = m2rnn_step(*arguments)
    y_dense, state_dense = m2rnn_step(*(x.clone(memory_format=torch.contiguous_format) for x in arguments))
    assert torch.equal(y, y_dense)
    assert torch.equal(state, state_dense)


def test_prefill_then_steps_match_one_scan(backend: str, device: str) -> None:
    """A state out of the scan goes into the step."""
    case = Case(batch=2, time=40, heads=(1, 1, 4, 4, 4))
    inputs = make_problem(case, device=device, grads=()).inputs
    weight, initial = inputs.pop("weight"), inputs.pop("initial_state")
    prefix = {name: x[:, :33] for name, x in inputs.items()}
    y, state = m2rnn_scan(**prefix, weight=weight, initial_state=initial, output_final_state=True, backend=backend)
    rest = {name: x[:, 33:] for name, x in inputs.items()}
    tail, final = _steps({**rest, "weight": weight, "initial_state": state})
    check({"y": torch.cat([y, tail], 1), "final_state": final}, truth(case), case)


def test_step_leaves_the_given_state_alone() -> None:
    """The caller may keep the old state, as beam search does."""
    inputs = make_problem(Case(batch=2, time=1), grads=()).inputs
    before = inputs["initial_state"].clone()
    _, state = m2rnn_step(*(inputs[n][:, 0] for n in "qkvf"), inputs["weight"], inputs["initial_state"])
    assert torch.equal(inputs["initial_state"], before)
    state.zero_()
    assert torch.equal(inputs["initial_state"], before)


def test_step_with_empty_batch() -> None:
    inputs = make_problem(Case(batch=0, time=1), grads=()).inputs
    y, state = m2rnn_step(*(inputs[n][:, 0] for n in "qkvf"), inputs["weight"], inputs["initial_state"])
    assert y.shape == (0, 2, 8)
    assert state.shape == (0, 2, 3, 8)


def test_gradient_flows_through_steps() -> None:
    """Training through steps, one at a time, has the scan's gradient."""
    case = Case(batch=2, time=5)
    problem = make_problem(case)
    state, ys = problem.inputs["initial_state"], []
    for t in range(case.time):
        y, state = m2rnn_step(*(problem.inputs[n][:, t] for n in "qkvf"), problem.inputs["weight"], state)
        ys.append(y)
    grads = torch.autograd.grad(
        [torch.stack(ys, 1), state], list(problem.inputs.values()), list(problem.cotangents.values())
    )
    for (name, grad), expected in zip(
        zip(problem.inputs, grads, strict=True), [truth(case)[n] for n in problem.inputs], strict=True
    ):
        assert_close(grad, expected, torch.float32, "gradient", f"d{name}")
