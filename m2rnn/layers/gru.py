"""The vector-state GRU as a mixer."""

from typing import Any

from torch import Tensor

from m2rnn.layers.rnn import RNN
from m2rnn.ops.vector_scan import gru_scan


class GRU(RNN):
    """Gated recurrent units side by side: N heads of V units, each with three matrices of its own.

    Each token is projected to x_t, the logits x_t^f and x_t^r of the forget and the reset gate, and an output gate
    g_t; then, per head,

        x_t = silu(conv(x_t))                     depthwise, causal; not on the logits
        f_t = σ(h_{t-1} W_f + x_t^f)              r_t = σ(h_{t-1} W_r + x_t^r)
        z_t = tanh((r_t ⊙ h_{t-1}) W + x_t)
        h_t = f_t ⊙ h_{t-1} + (1 - f_t) ⊙ z_t

    and the output is ``out_proj(norm(h ⊙ silu(g)))``. ``state_weight`` holds W, W_f and W_r, one after the other.
    Arguments, errors and source as for ``RNN``.
    """

    _inputs = 3

    def _scan(self, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, Any]:
        return gru_scan(*inputs, *weights, output_final_state=True, **options)
