"""The forget gate: how much of the state a token keeps, one number per head."""

import math
from collections.abc import Callable, Sequence
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2rnn.layers.initialize import initialize

SMALLEST_A = 1e-4  # keeps log(A) finite where the range starts at 0


class DecayGate(nn.Module):
    """``f = exp(-exp(A_log) · softplus(logit + dt_bias))``, in (0, 1], one pair of parameters per head.

    Computed in float32, or float64 for float64 logits. ``A_log`` and ``dt_bias`` are made in float32 (float64 where
    that is torch's default) and stay so under ``.to(torch.bfloat16)``, also in a model that is loaded in 16 bits: near
    f = 1 their rounding would decide how far the layer remembers. They take no weight decay.

    Args:
        num_heads: number of gates.
        A_range: A = exp(A_log) starts uniform in this range.
        dt_range: dt = softplus(dt_bias) starts log-uniform in this range.
        dt_floor: lower bound of the initial dt.

    Source: M²RNN (arXiv 2603.14360); the parametrisation is Mamba-2's.
    """

    _no_weight_decay = ("A_log", "dt_bias")

    def __init__(
        self,
        num_heads: int,
        A_range: tuple[float, float] = (0.0, 16.0),
        dt_range: tuple[float, float] = (1e-3, 0.1),
        dt_floor: float = 1e-4,
    ) -> None:
        super().__init__()
        for name, ends in {"A_range": A_range, "dt_range": dt_range}.items():
            if not isinstance(ends, Sequence) or len(ends) != 2 or not all(isinstance(end, Real) for end in ends):
                raise ValueError(f"{name} must be two numbers (low, high), got {ends!r}")
        if not 0 <= A_range[0] <= A_range[1] or A_range[1] < SMALLEST_A:
            raise ValueError(f"A_range must be (low, high) with 0 <= low <= high and high > 0, got {A_range}")
        if not 0 < dt_range[0] <= dt_range[1] or dt_floor <= 0:
            raise ValueError(f"dt_range and dt_floor must be positive and ordered, got {dt_range} and {dt_floor}")
        self.A_range, self.dt_range, self.dt_floor = A_range, dt_range, dt_floor
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.A_log = nn.Parameter(torch.empty(num_heads, dtype=dtype))
        self.dt_bias = nn.Parameter(torch.empty(num_heads, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        low, high = max(self.A_range[0], SMALLEST_A), self.A_range[1]
        initialize(self.A_log, lambda A: A.uniform_(low, high).log_())
        initialize(self.dt_bias, self._fill_dt_bias)

    def _fill_dt_bias(self, dt: Tensor) -> None:
        dt.uniform_(math.log(self.dt_range[0]), math.log(self.dt_range[1])).exp_().clamp_(min=self.dt_floor)
        dt.add_((-torch.expm1(-dt)).log_())  # the inverse of softplus

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """``logits`` [..., num_heads] of any floating dtype to log f and dt, same shape, float32 (or float64 for it).

        dt is ``softplus(logit + dt_bias)``, with which Mamba-2 also scales its inputs.
        """
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        dt = F.softplus(logits.to(dtype) + self.dt_bias.to(dtype))
        return -self.A_log.to(dtype).exp() * dt, dt

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DecayGate":
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = tensor.is_floating_point() and moved.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(moved.device) if narrowed else moved

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self
