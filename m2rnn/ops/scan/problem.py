"""A call of the operator as its backends see it, and the table of the backends.

A backend is a module with the functions of `Backend`. A new one is its file and a line in ``BACKENDS``.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from m2rnn.ops.backends.choice import Backends
from m2rnn.ops.backends.dtypes import promoted_dtype, state_dtype


class Problem(NamedTuple):
    """The tensors and options of ``m2rnn_scan``, and what follows from their shapes and dtypes alone."""

    q: Tensor  #: [B, T, Hq, K]
    k: Tensor  #: [B, T, Hk, K]
    v: Tensor  #: [B, T, Hv, V]
    f: Tensor  #: [B, T, Hf]
    weight: Tensor  #: [Hw, V, V]
    initial_state: Tensor | None = None  #: [sequences, H, K, V]
    cu_seqlens: Tensor | None = None  #: [sequences + 1]
    state_clip: float | None = None

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def heads(self) -> int:
        """H, the largest head count."""
        return max(self.q.shape[2], self.k.shape[2], self.v.shape[2], self.f.shape[2], self.weight.shape[0])

    @property
    def batch(self) -> int:
        """B, which is 1 for packed sequences."""
        return self.q.shape[0]

    @property
    def steps(self) -> int:
        """T."""
        return self.q.shape[1]

    @property
    def key_dim(self) -> int:
        return self.q.shape[3]

    @property
    def value_dim(self) -> int:
        return self.v.shape[3]

    @property
    def sequences(self) -> int:
        return self.batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_dtype(self) -> torch.dtype:
        return state_dtype(self.q, self.k, self.v, self.f, self.weight)

    @property
    def output_dtype(self) -> torch.dtype:
        """The dtype of y."""
        return promoted_dtype((self.q, self.k, self.v))

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.steps, self.heads, self.value_dim

    def new_y(self) -> Tensor:
        """y ``[B, T, H, V]``, not initialized."""
        return self.v.new_empty(self.y_shape, dtype=self.output_dtype)

    def new_states(self, count: int, dtype: torch.dtype | None = None) -> Tensor:
        """``[count, H, K, V]``, not initialized, in the state's dtype unless another is given."""
        return self.q.new_empty(count, self.heads, self.key_dim, self.value_dim, dtype=dtype or self.state_dtype)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]


class Backend(Protocol):
    """What the module of a backend has. Tensors of the problem may have any strides; none of them is modified."""

    def why_not(self, problem: Problem) -> str | None:
        """Why it cannot take tensors of this device, dtype and shape, or None if it can. Cheap: asked at every call."""

    def saved_like(self, problem: Problem) -> Tensor:
        """What ``forward`` saves for ``backward``: room of its shape and dtype, on the problem's device."""

    def forward(self, problem: Problem, save: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(y, final state, saved)``; nothing is saved unless ``save``."""

    def backward(self, problem: Problem, saved: Tensor, dy: Tensor, d_final: Tensor | None) -> Gradients:
        """Gradients of q, k, v, f, the weight and the initial state (None without one), in the dtypes of these."""


def _preferred(problem: Problem) -> tuple[str, ...]:
    match problem.device.type:
        case "cpu":
            return ("cpu",)
        case "cuda":
            # W and the state of a wide head leave the CUDA kernels too few registers, and one token too little to do
            slow = problem.output_dtype.itemsize == 2 and (problem.value_dim > 32 or problem.steps == 1)
            return ("triton", "cuda") if slow else ("cuda", "triton")
        case "meta":
            return ("reference",)
    return ()


BACKENDS = Backends(
    "m2rnn_scan",
    {
        "reference": "m2rnn.ops.scan.reference",
        "cpu": "m2rnn.ops.scan.cpu",
        "triton": "m2rnn.ops.scan.triton",
        "cuda": "m2rnn.ops.scan.cuda",
    },
    _preferred,
)


def states_between_chunks(batch: int, steps: int, chunk: int) -> int:
    """How many states lie at the start of a chunk of ``chunk`` steps, but a sequence's first."""
    return batch * max((steps + chunk - 1) // chunk - 1, 0)
