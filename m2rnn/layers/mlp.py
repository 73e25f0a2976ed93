"""The feed-forward half of a block."""

import torch.nn.functional as F
from torch import Tensor, nn

from m2rnn.layers.projection import OutputProjection
from m2rnn.layers.sizes import check_sizes


class SwiGLU(nn.Module):
    """``out_proj(silu(gate) ⊙ up)`` with ``[gate | up] = in_proj(x)``, no biases.

    Args:
        hidden_size: width of the input and the output.
        intermediate_size: width of gate and up, by default ``8/3 · hidden_size``, rounded up to a multiple
            of 64.
    """

    def __init__(self, hidden_size: int, intermediate_size: int | None = None) -> None:
        super().__init__()
        check_sizes(hidden_size=hidden_size, intermediate_size=intermediate_size)
        if intermediate_size is None:
            intermediate_size = -(-8 * hidden_size // (3 * 64)) * 64
        self.in_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.out_proj = OutputProjection(intermediate_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = self.in_proj(hidden).chunk(2, -1)
        out: Tensor = self.out_proj(F.silu(gate) * up)
        return out
