"""The standard cases and the tolerances catch a wrong recurrence: here it is broken on purpose."""

from collections.abc import Callable

import pytest
import torch

from tests.ops.cases import EMPTY, KIND, SLOW, STANDARD, Case, check, make_problem, truth
from tests.ops.scan.straight_line import MUTATIONS, straight_line
from tests.tolerances import TOLERANCES, assert_close, relative_error

MARGIN = 3.0
PER_DTYPE = 5


def _excess(case: Case, mutation: str | None) -> float:
    """The largest error over all results, as a multiple of the tolerance."""
    expected = truth(case)
    results = straight_line(make_problem(case), mutation)
    return max(
        relative_error(x, expected[name]) / TOLERANCES[case.dtype][KIND.get(name, "gradient")]
        for name, x in results.items()
    )


@pytest.mark.parametrize("case", [*STANDARD, *EMPTY], ids=str)
def test_straight_line_equals_the_reference(case: Case) -> None:
    """Unbroken, the second implementation gives the first one's numbers, in float64."""
    results, expected = straight_line(make_problem(case)), truth(case)
    assert set(results) == set(expected)
    for name, x in results.items():
        assert_close(x, expected[name], torch.float64, KIND.get(name, "gradient"), name)


def _shared(case: Case) -> bool:
    return any(1 < count < max(case.heads) for count in case.heads)


def _heads(index: int) -> Callable[[Case], bool]:
    # a head that is a stride-0 copy of its neighbour has no neighbour to be mistaken for
    return lambda case: case.heads[index] > 1 and case.layout != "expanded"


def _late_gradient(case: Case) -> bool:
    return case.final and (case.lengths is None or case.lengths[-1] > 0)


def _varied(case: Case) -> bool:
    # no stride-0 copies, and an f that lets every step count
    return case.layout != "expanded" and case.forget != "slow"


def _precise(case: Case) -> bool:
    return case.dtype in (torch.float32, torch.float64)


#: The cases in which a mutation changes the numbers enough to be seen: far from all, but some in each dtype.
APPLIES: dict[str, Callable[[Case], bool]] = {
    "tanh removed": lambda case: True,
    "forget ignored": lambda case: True,
    "forget halved gradient": lambda case: True,
    "head of q shifted": _heads(0),
    "head of k shifted": _heads(1),
    "head of v shifted": _heads(2),
    "head of f shifted": _heads(3),
    "head of weight shifted": lambda case: _heads(4)(case) and case.steps > 1 and _varied(case),
    "heads tiled": lambda case: _shared(case) and case.layout != "expanded",
    "clamp on G": lambda case: case.clip == 0.1,
    "clamp on dH_0": lambda case: case.clip == 0.1 and case.initial and case.steps < 50,
    "clamp missing": lambda case: case.clip == 0.1 and case.steps > 1,
    "clamp spares the final state": lambda case: (
        case.clip == 0.1 and _late_gradient(case) and case.layout != "expanded"
    ),
    "state in bfloat16": lambda case: _precise(case) or case in SLOW,
    "state in float16": lambda case: _precise(case) or case in SLOW,
    "weight transposed": lambda case: case.value > 1 and case.steps > 1 and _varied(case),
    "weight transposed in backward": lambda case: case.value > 1 and case.steps > 2 and _varied(case),
    "q of the previous step": lambda case: case.steps > 2 and case.layout != "expanded",
    "state of the previous step": lambda case: case.forget != "slow",
    "dW from the new state": lambda case: case.forget != "slow" and case.steps > 1,
    "initial state ignored": lambda case: case.initial,
    "gradient of the final state ignored": lambda case: _late_gradient(case) and case.steps < 50,
    "state leaks": lambda case: sum(n > 0 for n in case.lengths or ()) > 1 and case.layout != "expanded",
    "last step of a sequence dropped": lambda case: case.steps < 32 and case.forget == "spread" and _varied(case),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_is_caught(mutation: str) -> None:
    """Each mutation exceeds the tolerance threefold in every case it touches (five a dtype are tried)."""
    cases = [
        case
        for dtype in TOLERANCES
        for case in [case for case in STANDARD if case.dtype == dtype and APPLIES[mutation](case)][:PER_DTYPE]
    ]
    missed = []
    caught: dict[torch.dtype, int] = dict.fromkeys(TOLERANCES, 0)
    for case in cases:
        excess = _excess(case, mutation)
        if excess >= MARGIN:
            caught[case.dtype] += 1
        else:
            missed.append(f"{case}: ×{excess:.2g}")
    assert caught[torch.float32] >= 3, f"only {caught} cases catch it"
    assert caught[torch.bfloat16] >= 1, f"only {caught} cases catch it"
    assert caught[torch.float16] >= 1, f"only {caught} cases catch it"
    assert not missed, f"{len(missed)} of {len(cases)} cases let it pass: {missed[:5]}"


def test_mutated_results_fail_the_helper_that_the_backends_are_held_to() -> None:
    case = next(case for case in STANDARD if case.dtype == torch.float32 and case.steps > 30)
    problem = make_problem(case)
    check(straight_line(problem), truth(case), case)
    with pytest.raises(AssertionError, match=r"relative error .* over the .* tolerance"):
        check(straight_line(problem, "tanh removed"), truth(case), case)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_never_passes(bad: float) -> None:
    good = torch.ones(4)
    spoilt = torch.tensor([1.0, 1.0, bad, 1.0])
    for actual, expected in ((spoilt, good), (good, spoilt), (spoilt, spoilt)):
        with pytest.raises(AssertionError, match="not finite: "):
            assert_close(actual, expected, torch.bfloat16, "output")


def test_broadcastable_shapes_do_not_pass() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.ones(3, 1), torch.ones(3, 3), torch.float32, "output")
