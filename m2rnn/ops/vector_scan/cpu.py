"""The CPU backend of the vector recurrences: plans the work for the compiled loops of ``cpu_kernels.py``.

Memory beyond inputs, outputs and gradients: some steps of a few sequences a thread. The result is the same bits for any
number of threads, since the units of work and the order of every sum depend on the shapes alone.
"""

import math

import numpy as np
import torch
from torch import Tensor

from m2rnn.ops.backends.choice import why_not_on_device
from m2rnn.ops.backends.cpu import layout as layout
from m2rnn.ops.backends.threads import DTYPE_CODES, round_up, run_units
from m2rnn.ops.vector_scan.problem import Gradients, Problem

UNITS = 16  # pieces to cut the work into, if there are so many: more leave fewer heads to each
STEPS = 16  # staged at a time
TILE = 8  # sequences


class _Plan:
    """How one problem is cut up: all of it follows from shapes and ``cu_seqlens`` alone."""

    def __init__(self, problem: Problem):
        batch, steps, self.heads, self.count = problem.inputs[0].shape
        self.matrices, self.dtype, cu_seqlens = len(problem.inputs), problem.state_dtype, problem.cu_seqlens
        self.width = round_up(self.count, layout.VECTOR_BYTES // self.dtype.itemsize)
        if cu_seqlens is None:
            starts, lengths, rows = np.zeros(batch, np.int64), np.full(batch, steps, np.int64), np.arange(batch)
        else:
            bounds = cu_seqlens.numpy().astype(np.int64)
            starts, lengths, rows = bounds[:-1], np.diff(bounds), np.zeros(len(bounds) - 1, np.int64)
        order = np.argsort(-lengths, kind="stable")
        self.sequences = np.stack([rows, starts, lengths, np.arange(len(lengths))], axis=1)[order]

        gated = self.matrices > 1
        self.tile = TILE if len(lengths) > layout.ROWS else layout.ROWS
        tiles = -(-len(lengths) // self.tile)
        ranges = min(tiles, UNITS)
        groups = min(self.heads, -(-UNITS // max(ranges, 1)))
        cuts = np.minimum(np.arange(ranges + 1) * tiles // max(ranges, 1) * self.tile, len(lengths)).tolist()
        heads = (np.arange(groups + 1) * self.heads // groups).tolist()
        units = [
            (cuts[i], cuts[i + 1], heads[g], heads[g + 1], 0, 0, i, 0) for i in range(ranges) for g in range(groups)
        ]
        self.units, self.ranges = np.array(units, np.int64).reshape(-1, layout.UNIT_COLUMNS), ranges
        self.most_heads = -(-self.heads // groups)
        self.sizes = np.array([self.heads, self.count, self.width, STEPS, self.tile, gated], np.int64)

    def scratch_size(self, *, backward: bool) -> int:
        gated = self.matrices > 1
        return layout.rnn_scratch_size(self.most_heads, self.tile, STEPS, self.width, gated, backward)

    def describe(self, x: Tensor | None) -> list[int]:
        """The kernels' row for a tensor [B, T, heads, V]."""
        if x is None:
            return [0] * layout.TENSOR_COLUMNS
        return [x.data_ptr(), DTYPE_CODES[x.dtype], 0, *x.stride(), 1, 0, self.count, self.width, 0, 1, 1]

    def describe_inputs(self, tensors: list[Tensor]) -> list[list[int]]:
        return [self.describe(x) for x in [*tensors, *[None] * (3 - self.matrices)]]

    def padded(self, weights: list[Tensor]) -> Tensor:
        padded = torch.zeros(self.matrices, self.heads, self.width, self.width, dtype=self.dtype)
        for matrix, weight in zip(padded, weights, strict=True):
            matrix[:, : self.count, : self.count] = weight.detach()
        return padded

    def dense(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(self.dtype).contiguous()


def why_not(problem: Problem) -> str | None:
    return why_not_on_device("cpu", problem.device)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    inputs, weights, initial_state, _, _ = problem
    plan, y, final = _Plan(problem), problem.new_y(), problem.new_state()
    run_units(
        "rnn_forward", plan.dtype, plan.scratch_size(backward=False), plan.units,
        np.array([*plan.describe_inputs(inputs), plan.describe(y)]), plan.sequences, plan.sizes,
        plan.padded(weights), plan.dense(initial_state), final,
    )  # fmt: skip
    return y, final


def backward(problem: Problem, y: Tensor, dy: Tensor, d_final: Tensor | None) -> Gradients:
    inputs, weights, initial_state, _, state_clip = problem
    plan = _Plan(problem)
    d_inputs = [torch.empty(x.shape, dtype=x.dtype) for x in inputs]
    d_initial = None if initial_state is None else torch.empty(initial_state.shape, dtype=plan.dtype)
    padded = plan.padded(weights)
    d_weights = torch.empty(plan.ranges, plan.heads, plan.matrices, plan.width, plan.width, dtype=plan.dtype)
    run_units(
        "rnn_backward", plan.dtype, plan.scratch_size(backward=True), plan.units,
        np.array(
            [*plan.describe_inputs(inputs), plan.describe(y), plan.describe(dy), *plan.describe_inputs(d_inputs)]
        ),
        plan.sequences, plan.sizes, padded, padded.mT.contiguous(), plan.dense(initial_state), plan.dense(d_final),
        d_initial, d_weights, clip=(math.inf if state_clip is None else float(state_clip),),
    )  # fmt: skip
    by_head = torch.from_numpy(np.add.reduce(d_weights.numpy(), axis=0))  # in the units' order
    by_matrix = by_head[:, :, : plan.count, : plan.count].unbind(1)
    dw = [
        d.to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
        for d, weight in zip(by_matrix, weights, strict=True)
    ]
    return d_inputs, dw, None if d_initial is None or initial_state is None else d_initial.to(initial_state.dtype)
