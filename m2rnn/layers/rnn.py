"""The vector-state RNN as a mixer, and the body it shares with the GRU: projections and convolution around a scan."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2rnn.layers.gated_norm import gated_norm
from m2rnn.layers.initialize import initialize
from m2rnn.layers.packing import Packing, check_tokens
from m2rnn.layers.projection import OutputProjection
from m2rnn.layers.short_conv import ShortConv, check_activation, check_init_std, convolve
from m2rnn.layers.sizes import check_sizes
from m2rnn.layers.state import M2RNNState, next_state
from m2rnn.ops.vector_scan import rnn_scan


class RNN(nn.Module):
    """Recurrent networks side by side: N heads of V units, each with a matrix of its own.

    Each token is projected to x_t and an output gate g_t; then, per head,

        x_t = silu(conv(x_t))                     depthwise, causal
        h_t = tanh(h_{t-1} W + x_t)

    and the output is ``out_proj(norm(h ⊙ silu(g)))``, with one RMSNorm over all heads. The defaults are the
    language-model layer; state tracking wants other options (see ``presets.state_tracking``).

    Args:
        hidden_size: width of the input and the output.
        num_heads: N, default ``hidden_size // head_dim``.
        head_dim: V, the units of a head.
        conv_size: width of the convolution over x; None for none.
        conv_init: s, to start the convolution's weights from N(0, s²), as the authors' code does with s = 0.02; None
            for U(±1/√conv_size).
        activation: ``"silu"`` or None, on x, with or without a convolution.
        norm: RMSNorm before the output projection.
        norm_eps: its epsilon.
        gate: the output gate silu(g).
        weight_std: standard deviation of W at the start; None for 1/√V.
        state_clip: bound on each component of the gradient that reaches a state from later tokens, or None.
        backend: of the recurrence, see ``m2rnn.ops.vector_scan.rnn_scan``; None chooses.

    Raises:
        ValueError: for a size or ``conv_init`` that is not positive.

    Source: a baseline of M²RNN (arXiv 2603.14360), section 5.
    """

    _no_weight_decay = ("state_weight",)
    _inputs = 1  #: of the recurrence, each with a matrix per head

    def __init__(
        self,
        hidden_size: int,
        num_heads: int | None = None,
        head_dim: int = 16,
        *,
        conv_size: int | None = 4,
        conv_init: float | None = None,
        activation: str | None = "silu",
        norm: bool = True,
        norm_eps: float = 1e-5,
        gate: bool = True,
        weight_std: float | None = 0.02,
        state_clip: float | None = 1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        check_sizes(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim)
        check_activation(activation)
        check_init_std(conv_init=conv_init)
        self.num_heads = max(1, hidden_size // head_dim) if num_heads is None else num_heads
        self.head_dim, self.activation, self.gate = head_dim, activation, gate
        self.weight_std = head_dim**-0.5 if weight_std is None else weight_std
        self.state_clip, self.backend = state_clip, backend
        self.state_size = self.num_heads * head_dim

        self.in_proj = nn.Linear(hidden_size, (self._inputs + gate) * self.state_size, bias=False)
        self.conv = None
        if conv_size is not None:
            self.conv = ShortConv(self.state_size, conv_size, activation, init_std=conv_init)
        self.state_weight = nn.Parameter(torch.empty(self._inputs * self.num_heads, head_dim, head_dim))
        self.norm = nn.RMSNorm(self.state_size, eps=norm_eps) if norm else None
        self.out_proj = OutputProjection(self.state_size, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise W; the projections keep torch's default until a model initialises them."""
        initialize(self.state_weight, lambda weight: weight.normal_(0, self.weight_std))

    def _scan(self, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, Any]:
        return rnn_scan(*inputs, *weights, output_final_state=True, **options)

    def forward(
        self,
        hidden: Tensor,
        state: M2RNNState | None = None,
        packing: Packing | None = None,
        *,
        position_ids: Tensor | None = None,
        output_state: bool = True,
    ) -> tuple[Tensor, M2RNNState | None]:
        """Mix along time; arguments and results as in ``M2RNN.forward``. The recurrent state is ``[B, N, V]``."""
        check_tokens(hidden, state, packing, self.hidden_size)
        x, *others = self.in_proj(hidden).split(self.state_size, -1)
        x, conv_state = convolve(x, self.conv, self.activation, state, packing, output_state=output_state)
        inputs = tuple(part.unflatten(-1, (self.num_heads, self.head_dim)) for part in (x, *others[: self._inputs - 1]))
        y, recurrent = self._scan(
            inputs,
            self.state_weight.split(self.num_heads),
            initial_state=None if state is None else state.recurrent,
            cu_seqlens=None if packing is None else packing.cu_seqlens,
            check_offsets=False,  # the packing's, which has checked them
            state_clip=self.state_clip,
            backend=self.backend,
        )
        y = gated_norm(y.flatten(-2), F.silu(others[-1]) if self.gate else None, self.norm)
        final_state = next_state(state, recurrent, conv_state, hidden, packing) if output_state else None
        return self.out_proj(y), final_state

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"
