"""The operator's test problems: what varies, how inputs are drawn, and how a result is judged.

The draws make every part of the equation count. k and v are N(0, 1.25²), so that 40 to 50 % of the pre-
activations exceed 1, 20 % exceed 2, and tanh saturates; W is N(0, 1.2²/V) per entry, so that H W is as
large as k vᵀ; f covers (0, 1), or sits near 1, or is 0 or 1 exactly now and then. The recurrence does
not become chaotic with them: over 4096 steps with V = 2, 16, 64 the plain float32 loop stays within
2.7e-6 of the float64 one in outputs and states and 3.2e-6 in gradients, inside the table by a factor of
4; test_scan.py holds the long cases to the table. (With W scaled by 1.5 and k, v by 1 it is twice as
bad.)
"""

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from m2rnn.ops import m2rnn_scan
from m2rnn.ops.scan import reference
from tests.tolerances import assert_close

GRADIENTS = ("q", "k", "v", "f", "weight", "initial_state")
KIND = {"y": "output", "final_state": "state"}  # everything else is a gradient


@dataclass(frozen=True)
class Case:
    """One point of the test matrix; ``lengths`` are those of packed sequences and replace ``time``."""

    batch: int = 1
    time: int = 5
    key: int = 3
    value: int = 8
    heads: tuple[int, int, int, int, int] = (1, 1, 2, 2, 2)  # of q, k, v, f, weight
    lengths: tuple[int, ...] | None = None
    initial: bool = True
    final: bool = True
    clip: float | None = None
    forget: str = "spread"  # spread over (0, 1) | slow (near 1) | ends (a tenth exactly 0, a tenth exactly 1)
    layout: str = "contiguous"  # contiguous | transposed | sliced | strided | expanded
    dtype: torch.dtype = torch.float32
    gates: torch.dtype | None = None  # of f, weight; as dtype if None
    index: torch.dtype = torch.int64  # of cu_seqlens

    def __str__(self) -> str:
        packed = "" if self.lengths is None else "packed" + "+".join(map(str, self.lengths))
        parts = [
            packed or f"B{self.batch}-T{self.time}",
            f"K{self.key}-V{self.value}-heads{'.'.join(map(str, self.heads))}",
            "h0" if self.initial else "zero",
            *([] if self.final else ["nofinal"]),
            f"clip{self.clip}-{self.forget}-{self.layout}-{str(self.dtype)[6:]}",
            *([] if self.gates is None else [f"gates_{str(self.gates)[6:]}"]),
        ]
        return "-".join(parts)

    @property
    def steps(self) -> int:
        return self.time if self.lengths is None else sum(self.lengths)

    @property
    def rows(self) -> int:
        """Batch size of q, k, v, f."""
        return self.batch if self.lengths is None else 1

    @property
    def sequences(self) -> int:
        """Batch size of the states."""
        return self.batch if self.lengths is None else len(self.lengths)

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


@dataclass
class Problem:
    """Tensors for one case: inputs, some of which require grad, and gradients of y and the final state."""

    case: Case
    inputs: dict[str, Tensor]
    cotangents: dict[str, Tensor]
    cu_seqlens: Tensor | None = None
    results: dict[str, Tensor] = field(default_factory=dict)

    def as_double(self) -> "Problem":
        """The same numbers in float64, contiguous."""

        def convert(x: Tensor) -> Tensor:
            return x.detach().double().contiguous().clone().requires_grad_(x.requires_grad)

        return replace(
            self,
            inputs={name: convert(x) for name, x in self.inputs.items()},
            cotangents={name: convert(x) for name, x in self.cotangents.items()},
        )


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The numbers of ``x`` at other strides; the memory between them is NaN."""
    if layout == "transposed":
        a, b = (0, 1) if x.dim() == 2 else (1, 2)
        return x.transpose(a, b).contiguous().transpose(a, b)
    if layout == "sliced":  # out of a wider projection
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    if layout == "strided":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "expanded":  # the first index of a dimension stands for all of it, at stride 0
        dims = [d for d in range(x.dim() - 1) if x.shape[d] > 1]
        return x.narrow(dims[0], 0, 1).expand(x.shape) if dims else x
    assert layout == "contiguous"
    return x.contiguous()


def make_problem(case: Case, *, seed: int = 0, device: str = "cpu", grads: Iterable[str] = GRADIENTS) -> Problem:
    """Random inputs and cotangents for ``case``, with gradients for the inputs named in ``grads``."""
    generator = torch.Generator().manual_seed(seed)
    rows, steps, n_heads = case.rows, case.steps, max(case.heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    q_heads, k_heads, v_heads, f_heads, w_heads = case.heads
    f, rate = uniform(rows, steps, f_heads), uniform(f_heads)
    if case.forget == "slow":  # one rate a head, down to 1e-4: a 16-bit state would stand still, as would a 16-bit f
        f = 1 - f * 10 ** (-1 - rate if (case.gates or case.dtype).itemsize == 2 else -2 - 2 * rate)
    elif case.forget == "ends":
        ends = uniform(rows, steps, f_heads)
        f = torch.where(ends < 0.1, 0.0, torch.where(ends > 0.9, 1.0, f))
    gates = case.gates or case.dtype
    inputs = {
        "q": normal(rows, steps, q_heads, case.key).to(case.dtype),
        "k": (1.25 * normal(rows, steps, k_heads, case.key)).to(case.dtype),
        "v": (1.25 * normal(rows, steps, v_heads, case.value)).to(case.dtype),
        "f": f.to(gates),
        "weight": (1.2 / case.value**0.5 * normal(w_heads, case.value, case.value)).to(gates),
    }
    state_shape = (case.sequences, n_heads, case.key, case.value)
    if case.initial:
        inputs["initial_state"] = normal(*state_shape).to(case.state_dtype)
    cotangents = {"y": normal(rows, steps, n_heads, case.value).to(case.dtype)}
    if case.final:
        cotangents["final_state"] = normal(*state_shape).to(case.state_dtype)
    cu_seqlens = None
    if case.lengths is not None:
        cu_seqlens = torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=case.index, device=device)
    grads = set(grads)
    return Problem(
        case,
        {name: lay_out(x.to(device), case.layout).requires_grad_(name in grads) for name, x in inputs.items()},
        {name: lay_out(x.to(device), case.layout) for name, x in cotangents.items()},
        cu_seqlens,
    )


def evaluate(problem: Problem, scan: Callable[..., tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
    """y, the final state and the gradients, by the names of what they are the gradient of."""
    y, final_state = scan(problem)
    results = {"y": y}
    if problem.case.final:
        assert final_state is not None, "output_final_state=True returned no state"
        results["final_state"] = final_state
    else:
        assert final_state is None, "output_final_state=False returned a state"
    wanted = [name for name, x in problem.inputs.items() if x.requires_grad]
    used = [name for name, x in results.items() if x.requires_grad and name in problem.cotangents]
    if used and wanted:
        grads = torch.autograd.grad(
            [results[name] for name in used],
            [problem.inputs[name] for name in wanted],
            [problem.cotangents[name] for name in used],
            materialize_grads=True,
            allow_unused=True,
        )
    else:
        grads = tuple(torch.zeros_like(problem.inputs[name]) for name in wanted)
    results.update(zip(wanted, grads, strict=True))
    return {name: x.detach() for name, x in results.items()}


def fit(case: Case, backend: str | None) -> Case:
    """The case, in float32 if it is in float64 and the backend does not compute in that."""
    return replace(case, dtype=torch.float32) if backend == "cuda" and case.dtype == torch.float64 else case


def run(problem: Problem, backend: str | None, **options: Any) -> dict[str, Tensor]:
    """The operator on ``backend``."""
    if problem.case != fit(problem.case, backend):
        pytest.skip(f"{backend} does not compute in {problem.case.dtype}")
    return evaluate(
        problem,
        lambda p: m2rnn_scan(
            **p.inputs,
            output_final_state=p.case.final,
            cu_seqlens=p.cu_seqlens,
            state_clip=p.case.clip,
            backend=backend,
            **options,
        ),
    )


def run_autograd(problem: Problem) -> dict[str, Tensor]:
    """The definition, differentiated by autograd."""

    def scan(p: Problem) -> tuple[Tensor, Tensor | None]:
        y, state = reference.scan(**p.inputs, cu_seqlens=p.cu_seqlens, state_clip=p.case.clip)
        return y, state if p.case.final else None

    return evaluate(problem, scan)


@cache
def truth(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """The float64 results of the problem that ``make_problem(case, seed=seed)`` draws."""
    return run_autograd(make_problem(case, seed=seed).as_double())


def make_long(dtype: torch.dtype, *, device: str = "cpu") -> Problem:
    """``LONG`` with numbers that all four dtypes hold exactly, so that they share one truth."""
    problem = make_problem(LONG, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # of the gates and states

    def convert(name: str, x: Tensor) -> Tensor:
        is_wide = name in ("f", "weight", "initial_state", "final_state")
        converted = x.detach().float().to(wide) if is_wide else x.detach().bfloat16().half().to(dtype)
        return converted.requires_grad_(x.requires_grad)

    return replace(
        problem,
        case=replace(LONG, dtype=dtype, gates=wide),
        inputs={name: convert(name, x) for name, x in problem.inputs.items()},
        cotangents={name: convert(name, x) for name, x in problem.cotangents.items()},
    )


@cache
def truth_of_long() -> dict[str, Tensor]:
    """The float64 results of ``make_long`` of any dtype."""
    return run_autograd(make_long(torch.float64))


def check(results: dict[str, Tensor], expected: dict[str, Tensor], case: Case) -> None:
    """Every result that was computed is within the tolerance of the case's dtype."""
    __tracebackhide__ = True
    for name, x in results.items():
        assert_close(x, expected[name], case.dtype, KIND.get(name, "gradient"), name if name in KIND else f"d{name}")


# Each pair of values of two of these factors occurs in some standard case.
_FACTORS: dict[str, list[Any]] = {
    "time": [1, 2, 31, 32, 33, 100],
    "value": [1, 2, 7, 8, 16, 24, 32, 33, 64],
    "heads": [
        (1, 1, 1, 1, 1),
        (1, 1, 4, 4, 4),  # the paper's
        (4, 4, 4, 4, 4),
        (2, 1, 4, 2, 4),
        (1, 2, 1, 4, 2),
        (4, 2, 1, 1, 2),
        (1, 3, 6, 2, 1),
        (6, 1, 2, 3, 3),
    ],
    "key": [1, 3, 5, 16, 17],
    "sequences": ["one", "three", "packed", "empty first", "empty inside", "empty last"],
    "states": [(False, False), (False, True), (True, False), (True, True)],
    "clip": [None, 0.1, 1e3],
    "forget": ["spread", "slow", "ends"],
    "layout": ["contiguous", "transposed", "sliced", "strided", "expanded"],
    "dtype": [
        (torch.float32, None),
        (torch.float64, None),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
}


def _split(time: int, sequences: str) -> tuple[int, ...]:
    first = time // 3
    return {
        "packed": (first, time - first),
        "empty first": (0, first, time - first),
        "empty inside": (first, 0, 0, time - first),
        "empty last": (time - first, first, 0),
    }[sequences]


def from_factors(choice: dict[str, Any]) -> Case:
    """The case for one value of each factor."""
    sequences = choice["sequences"]
    dtype, gates = choice["dtype"]
    return Case(
        batch=3 if sequences == "three" else 1,
        time=choice["time"],
        key=choice["key"],
        value=choice["value"],
        heads=choice["heads"],
        lengths=None if sequences in ("one", "three") else _split(choice["time"], sequences),
        initial=choice["states"][0],
        final=choice["states"][1],
        clip=choice["clip"],
        forget=choice["forget"],
        layout=choice["layout"],
        dtype=dtype,
        gates=gates,
    )


def _cover_pairs(factors: dict[str, list[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Few rows in which every pair of values of every two factors occurs, found greedily."""
    rng = random.Random(seed)
    names = list(factors)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(factors[names[a]]))
        for j in range(len(factors[names[b]]))
    }
    rows = []
    while missing:
        best: tuple[set[tuple[int, int, int, int]], list[int]] = (set(), [])
        start = min(missing)
        for _ in range(40):
            row = [rng.randrange(len(factors[name])) for name in names]
            row[start[0]], row[start[2]] = start[1], start[3]
            covered = missing & {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(names)), 2)}
            if len(covered) > len(best[0]):
                best = (covered, row)
        missing -= best[0]
        rows.append({name: factors[name][i] for name, i in zip(names, best[1], strict=True)})
    return rows


_PAIRS = [from_factors(row) for row in _cover_pairs(_FACTORS)]
#: Where a 16-bit state shows in 16-bit results: many steps, each a smaller move than the rounding.
SLOW = [
    Case(time=300, key=4, value=16, heads=(1, 1, 4, 4, 4), forget="slow", dtype=dtype, gates=torch.float32)
    for dtype in (torch.bfloat16, torch.float16)
]
#: The cases that every backend has to pass: all pairs of factors, and each of them in float32.
STANDARD = list(dict.fromkeys([*_PAIRS, *(replace(case, dtype=torch.float32, gates=None) for case in _PAIRS), *SLOW]))

#: The longest that the tolerances promise, for every dtype at once: see ``make_long``.
LONG = Case(time=4096, value=16, forget="slow", dtype=torch.float64)

#: Shapes with nothing in them.
EMPTY = [
    Case(time=0),
    Case(time=0, batch=3, initial=False, clip=0.1),
    Case(time=0, lengths=(0, 0), dtype=torch.bfloat16),
    Case(time=0, lengths=()),
    Case(time=4, batch=0),
    Case(time=0, batch=0, initial=False, final=False),
]


def random_case(rng: random.Random) -> Case:
    """Any small case, beyond the values that the standard list uses."""
    n_heads = rng.randint(1, 6)
    divisors = [d for d in range(1, n_heads + 1) if n_heads % d == 0]
    heads = [rng.choice(divisors) for _ in range(5)]
    heads[rng.randrange(5)] = n_heads
    packed = rng.random() < 0.4
    return Case(
        batch=rng.randint(0, 3) if rng.random() < 0.5 else 1,
        time=rng.choice([0, 1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65]),
        key=rng.randint(1, 20),
        value=rng.choice([1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 31, 32, 40]),
        heads=(heads[0], heads[1], heads[2], heads[3], heads[4]),
        lengths=tuple(rng.choice([0, 1, 2, 5, 31, 33]) for _ in range(rng.randint(1, 5))) if packed else None,
        initial=rng.random() < 0.5,
        final=rng.random() < 0.7,
        clip=rng.choice([None, None, 0.03, 0.3, 1.0, 100.0]),
        forget=rng.choice(["spread", "slow", "ends"]),
        layout=rng.choice(["contiguous", "transposed", "sliced", "strided", "expanded"]),
        dtype=rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]),
        gates=None,
        index=rng.choice([torch.int32, torch.int64]),
    )
