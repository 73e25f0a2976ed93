"""The recurrence once more, written from the equations alone, forward and backward, to be broken at will.

It shares no code with the library: unbroken, it is a second opinion on the reference; broken on purpose, it
shows what the test cases catch. Plain loops over sequences and steps, float64.
"""

import torch
from torch import Tensor

from tests.ops.cases import Problem

#: name of a mutation -> what is wrong
MUTATIONS = {
    "tanh removed": "Z = H W + k vᵀ",
    "forget ignored": "H = Z whatever f",
    "forget halved gradient": "df without the part of Z",
    "head of q shifted": "head n reads the next source",
    "head of k shifted": "head n reads the next source",
    "head of v shifted": "head n reads the next source",
    "head of f shifted": "head n reads the next source",
    "head of weight shifted": "head n reads the next source",
    "heads tiled": "head n reads source n % count, not n // (N / count)",
    "clamp on G": "clamp(q dyᵀ + c)",
    "clamp on dH_0": "the gradient of the initial state is clamped too",
    "clamp missing": "the carry is not clamped",
    "clamp spares the final state": "the gradient of the final state is not clamped",
    "state in bfloat16": "H is rounded to bfloat16 after every step",
    "state in float16": "H is rounded to float16 after every step",
    "weight transposed": "H Wᵀ in the forward pass",
    "weight transposed in backward": "dX W in place of dX Wᵀ",
    "q of the previous step": "y_t = H_tᵀ q_{t-1}",
    "state of the previous step": "y_t = H_{t-1}ᵀ q_t",
    "dW from the new state": "dW += H_tᵀ dX_t",
    "initial state ignored": "H_0 = 0",
    "gradient of the final state ignored": "c_T = 0",
    "state leaks": "a packed sequence starts from the state of the one before",
    "last step of a sequence dropped": "its dv is left at zero",
}


def _source(n: int, heads: int, count: int, name: str, mutation: str | None) -> int:
    if mutation == f"head of {name} shifted":
        return (n // (heads // count) + 1) % count
    if mutation == "heads tiled":
        return n % count
    return n // (heads // count)


def straight_line(problem: Problem, mutation: str | None = None) -> dict[str, Tensor]:
    """y, the final state and all gradients of ``problem``, with one mutation or none."""
    assert mutation is None or mutation in MUTATIONS
    case = problem.case
    x = {name: t.detach().double() for name, t in problem.inputs.items()}
    cotangents = {name: t.double() for name, t in problem.cotangents.items()}
    heads = max(case.heads)
    sources = {
        name: [_source(n, heads, count, name, mutation) for n in range(heads)]
        for name, count in zip(("q", "k", "v", "f", "weight"), case.heads, strict=True)
    }
    wide = {name: x[name][:, :, sources[name]] for name in ("q", "k", "v", "f")}
    w = x["weight"][sources["weight"]]  # [N, V, V]
    state_shape = (case.sequences, heads, case.key, case.value)
    initial = x.get("initial_state", torch.zeros(state_shape, dtype=torch.float64))
    if mutation == "initial state ignored":
        initial = torch.zeros_like(initial)
    d_final = cotangents.get("final_state", torch.zeros(state_shape, dtype=torch.float64))
    if mutation == "gradient of the final state ignored":
        d_final = torch.zeros_like(d_final)

    y = torch.zeros(case.rows, case.steps, heads, case.value, dtype=torch.float64)
    final, d_initial = torch.empty_like(initial), torch.empty_like(initial)
    grad = {name: torch.zeros_like(t) for name, t in wide.items()}
    d_w = torch.zeros_like(w)

    if case.lengths is None:
        sequences = [(slice(None), slice(None), 0, case.time)]
    else:
        ends = torch.tensor(case.lengths, dtype=torch.int64).cumsum(0).tolist()
        sequences = [
            (slice(n, n + 1), slice(0, 1), e - t, e) for n, (t, e) in enumerate(zip(case.lengths, ends, strict=True))
        ]

    leaked = None
    for states, rows, start, end in sequences:
        h = initial[states] if leaked is None else leaked
        history = []
        for t in range(start, end):
            q, k, v, f = (wide[name][rows, t] for name in ("q", "k", "v", "f"))
            forget = torch.zeros_like(f)[..., None, None] if mutation == "forget ignored" else f[..., None, None]
            z = h @ (w.mT if mutation == "weight transposed" else w) + k[..., :, None] * v[..., None, :]
            if mutation != "tanh removed":
                z = z.tanh()
            new = forget * h + (1 - forget) * z
            if mutation in ("state in bfloat16", "state in float16"):
                new = new.to(torch.bfloat16 if mutation == "state in bfloat16" else torch.float16).double()
            if mutation == "q of the previous step":
                q = wide["q"][rows, max(t - 1, start)]
            y[rows, t] = ((h if mutation == "state of the previous step" else new) * q[..., None]).sum(-2)
            history.append((h, z, new, q, k, v, forget))
            h = new
        final[states] = h
        leaked = h if mutation == "state leaks" else None

        carry = d_final[states]
        for t in reversed(range(start, end)):
            before, z, after, q, k, v, forget = history[t - start]
            dy = cotangents["y"][rows, t]
            spared = mutation == "clamp missing" or (mutation == "clamp spares the final state" and t == end - 1)
            g = q[..., :, None] * dy[..., None, :]
            if mutation == "clamp on G" and case.clip is not None:
                g = (g + carry).clamp(-case.clip, case.clip)
            else:
                g = g + (carry if case.clip is None or spared else carry.clamp(-case.clip, case.clip))
            slope = 1 if mutation == "tanh removed" else 1 - z**2
            dx = (1 - forget) * g * slope
            carry = forget * g + dx @ (
                w if mutation in ("weight transposed", "weight transposed in backward") else w.mT
            )
            d_w += ((after if mutation == "dW from the new state" else before).mT @ dx).sum(0)
            grad["q"][rows, t] = (after * dy[..., None, :]).sum(-1)
            grad["k"][rows, t] = (dx * v[..., None, :]).sum(-1)
            if not (mutation == "last step of a sequence dropped" and t == end - 1):
                grad["v"][rows, t] = (dx * k[..., :, None]).sum(-2)
            grad["f"][rows, t] = (g * (before if mutation == "forget halved gradient" else before - z)).sum((-1, -2))
        if mutation == "clamp on dH_0" and case.clip is not None:
            carry = carry.clamp(-case.clip, case.clip)
        d_initial[states] = carry

    results = {"y": y}
    if case.final:
        results["final_state"] = final
    for name, wide_grad in grad.items():
        dim = 2
        results[name] = torch.zeros_like(x[name]).index_add(dim, torch.tensor(sources[name]), wide_grad)
    results["weight"] = torch.zeros_like(x["weight"]).index_add(0, torch.tensor(sources["weight"]), d_w)
    if case.initial:
        results["initial_state"] = d_initial
    return results
