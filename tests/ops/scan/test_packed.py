"""Packed sequences are separate sequences: nothing of one reaches another, not even a NaN."""

import itertools

import pytest
import torch
from torch import Tensor

from m2rnn.ops import m2rnn_scan
from tests.ops.cases import Case, check, evaluate, make_problem, run, truth

LENGTHS = [(7, 1, 33), (0, 5, 64), (40, 0, 0, 3), (2, 31, 0), (0,), (0, 0), (), (32, 32, 1, 1), (1,) * 70]


def _apart(problem, backend: str | None) -> tuple[Tensor, Tensor]:
    """The sequences of a packed problem, one call each, joined again."""
    inputs, case = dict(problem.inputs), problem.case
    weight, initial = inputs.pop("weight"), inputs.pop("initial_state", None)
    bounds = [0, *itertools.accumulate(case.lengths)]
    ys, states = [], []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        y, state = m2rnn_scan(
            **{name: x[:, start:end] for name, x in inputs.items()},
            weight=weight,
            initial_state=None if initial is None else initial[n : n + 1],
            output_final_state=True,
            state_clip=case.clip,
            backend=backend,
        )
        ys.append(y)
        states.append(state)
    return torch.cat(ys, 1), torch.cat(states)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("lengths", [x for x in LENGTHS if x], ids=lambda x: "+".join(map(str, x))[:20])
def test_packed_equals_one_sequence_at_a_time(
    lengths: tuple[int, ...], clip: float | None, backend: str, device: str
) -> None:
    """In float64, since the order of the sum over sequences in dW may differ."""
    case = Case(lengths=lengths, clip=clip, heads=(1, 2, 4, 4, 2), dtype=torch.float64)
    if backend == "cuda":  # no float64
        case = Case(lengths=lengths, clip=clip, heads=(1, 2, 4, 4, 2))
    packed = run(make_problem(case, device=device), backend)
    apart = evaluate(make_problem(case, device=device), lambda p: _apart(p, backend))
    tolerance = 1e-12 if case.dtype == torch.float64 else 1e-5
    for name, x in packed.items():
        torch.testing.assert_close(x, apart[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("value", [16, 64])
def test_short_sequences_match_float64(value: int, seed: int, backend: str, device: str) -> None:
    """Their y may be a sum that cancels, which shows the rounding of each summand."""
    case = Case(lengths=(7, 1, 33), key=32, value=value, forget="slow", dtype=torch.bfloat16)
    check(run(make_problem(case, seed=seed, device=device), backend), truth(case, seed), case)


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: "+".join(map(str, x))[:20])
def test_empty_sequences_hand_their_state_through(lengths: tuple[int, ...], backend: str, device: str) -> None:
    """The final state of an empty sequence is its initial state, its gradient passes whole, clamp or not."""
    case = Case(lengths=lengths, clip=0.1)
    problem = make_problem(case, device=device)
    results = run(problem, backend)
    for n in (n for n, length in enumerate(lengths) if length == 0):
        assert torch.equal(results["final_state"][n], problem.inputs["initial_state"][n])
        assert torch.equal(results["initial_state"][n], problem.cotangents["final_state"][n])


def _spoil(problem, name: str, start: int, sequence: int) -> None:
    with torch.no_grad():
        if name == "initial_state":
            problem.inputs[name][sequence] = torch.nan
        elif name == "final_state":
            problem.cotangents[name][sequence] = torch.nan
        elif name == "y":
            problem.cotangents[name][:, start] = torch.nan
        else:
            problem.inputs[name][:, start] = torch.nan


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("spoilt", ["q", "k", "v", "f", "initial_state", "y", "final_state"])
def test_nan_stays_in_its_sequence(spoilt: str, clip: float | None, backend: str, device: str) -> None:
    """Results and gradients of the other sequences keep their bits; dW, a sum over all, has the NaN."""
    lengths, bad = (33, 0, 35, 3), 2
    case = Case(lengths=lengths, clip=clip)
    clean = run(make_problem(case, device=device), backend)
    problem = make_problem(case, device=device)
    bounds = [0, *itertools.accumulate(lengths)]
    _spoil(problem, spoilt, bounds[bad] + 20, bad)
    results = run(problem, backend)
    others = [n for n in range(len(lengths)) if n != bad]
    steps = torch.ones(sum(lengths), dtype=torch.bool)
    steps[bounds[bad] : bounds[bad + 1]] = False
    for name, x in results.items():
        if name == "weight":
            continue
        index = (others,) if name in ("final_state", "initial_state") else (slice(None), steps)
        assert torch.equal(x[index], clean[name][index]), f"{name} of another sequence changed"
    assert results["weight"].isnan().any()
    assert any(x.isnan().any() for name, x in results.items() if name != "weight")


@pytest.mark.parametrize("clip", [None, 0.1, 1e3])
@pytest.mark.parametrize("spoilt", ["k", "v", "f", "initial_state", "y", "final_state"])
@pytest.mark.parametrize("value", [3, 8])
def test_nan_never_turns_into_a_number(spoilt: str, clip: float | None, value: int, backend: str, device: str) -> None:
    """tanh and the clamp keep a NaN: it reaches all later states, or all earlier gradients."""
    steps, at = 36, 34
    problem = make_problem(Case(time=steps, value=value, clip=clip, heads=(1, 1, 1, 1, 1)), device=device)
    _spoil(problem, spoilt, at, 0)
    results = run(problem, backend)
    if spoilt in ("y", "final_state"):
        before = at if spoilt == "y" else steps
        assert results["y"].isfinite().all()
        for name in ("k", "v", "f"):
            assert results[name][:, :before].isnan().all(), f"d{name}"
    else:
        after = 0 if spoilt == "initial_state" else at
        assert results["y"][:, after:].isnan().all()
        assert results["y"][:, :after].isfinite().all()
        assert results["final_state"].isnan().all()
        assert results["v"].isnan().all()  # every gradient passes the spoilt step on its way back
    assert results["initial_state"].isnan().all()
    assert results["weight"].isnan().all()
