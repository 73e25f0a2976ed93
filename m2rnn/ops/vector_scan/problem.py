"""A call of the vector recurrence as its backends see it, and the table of the backends.

A backend is a module with ``why_not(problem)``, ``forward(problem)``, which returns y and the final state, and
``backward(problem, y, dy, d_final)``. Nothing else is saved: y is the state after every step.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from m2rnn.ops.backends.choice import Backends
from m2rnn.ops.backends.dtypes import promoted_dtype, state_dtype


class Problem(NamedTuple):
    """The tensors and options of ``rnn_scan`` (one input and weight) or ``gru_scan`` (three)."""

    inputs: list[Tensor]  #: [x] or [x, x_forget, x_reset], each [B, T, H, V]
    weights: list[Tensor]  #: [W] or [W, W_forget, W_reset], each [H, V, V]
    initial_state: Tensor | None = None  #: [sequences, H, V]
    cu_seqlens: Tensor | None = None  #: [sequences + 1]
    state_clip: float | None = None

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    @property
    def steps(self) -> int:
        """T."""
        return self.inputs[0].shape[1]

    @property
    def heads(self) -> int:
        return self.inputs[0].shape[2]

    @property
    def units(self) -> int:
        """V."""
        return self.inputs[0].shape[3]

    @property
    def sequences(self) -> int:
        return self.inputs[0].shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_dtype(self) -> torch.dtype:
        return state_dtype(*self.inputs, *self.weights)

    @property
    def output_dtype(self) -> torch.dtype:
        """The dtype of y."""
        return promoted_dtype(self.inputs)

    def new_y(self) -> Tensor:
        """y ``[B, T, H, V]``, not initialized."""
        return self.inputs[0].new_empty(self.inputs[0].shape, dtype=self.output_dtype)

    def new_state(self) -> Tensor:
        """A state of every sequence ``[sequences, H, V]``, not initialized."""
        return self.inputs[0].new_empty(self.sequences, self.heads, self.units, dtype=self.state_dtype)


Gradients = tuple[list[Tensor], list[Tensor], Tensor | None]


def _preferred(problem: Problem) -> tuple[str, ...]:
    return {"cpu": ("cpu",), "cuda": ("triton",), "meta": ("reference",)}.get(problem.device.type, ())


BACKENDS = Backends(
    "the vector recurrence",
    {
        "reference": "m2rnn.ops.vector_scan.reference",
        "cpu": "m2rnn.ops.vector_scan.cpu",
        "triton": "m2rnn.ops.vector_scan.triton",
    },
    _preferred,
)
