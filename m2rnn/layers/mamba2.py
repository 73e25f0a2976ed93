"""The Mamba-2 mixer: a selective state space with one decay per head, in its form as gated linear attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2rnn.layers.decay_gate import DecayGate
from m2rnn.layers.gated_norm import check_gate_order, gated_norm
from m2rnn.layers.initialize import initialize
from m2rnn.layers.packing import Packing, check_tokens
from m2rnn.layers.projection import OutputProjection, project_parts
from m2rnn.layers.short_conv import ShortConv, check_activation, check_init_std, convolve
from m2rnn.layers.sizes import check_sizes
from m2rnn.layers.state import M2RNNState, next_state
from m2rnn.ops.linear_scan import gated_linear_scan


class Mamba2(nn.Module):
    """A recurrent mixer with a matrix state per head that decays and takes up each token, linear in the state.

    Each token is projected to x (a value per head), B and C (a key and a query, shared by all heads), a logit of dt
    and a gate g; then, per head,

        x, B, C = silu(conv(x, B, C))                     depthwise, causal
        dt_t = softplus(logit + dt_bias)
        S_t = exp(-exp(A_log) · dt_t) S_{t-1} + B_t (dt_t x_t)ᵀ
        y_t = S_tᵀ C_t + D x_t

    and the output is ``out_proj(norm(y ⊙ silu(g)))``, with one RMSNorm over all heads.

    Args:
        hidden_size: width of the input and the output.
        num_heads: heads, which divide ``inner_size``; default ``inner_size // 64``.
        state_size: rows of the state, the width of B and C.
        inner_size: width of x over all heads; default ``2 · hidden_size``.
        conv_size: width of the convolution over x, B and C; None for none.
        conv_init: s, to start the convolution's weights from N(0, s²), as the authors' code does with s = 0.02; None
            for U(±1/√conv_size).
        conv_bias: whether it has a bias.
        activation: ``"silu"`` or None, on x, B and C, with or without a convolution.
        norm: RMSNorm before the output projection.
        norm_eps: its epsilon.
        residual: the term D x.
        gate: the output gate silu(g).
        norm_before_gate: norm(y) ⊙ silu(g) instead of norm(y ⊙ silu(g)), as in fla; needs both.
        A_range, dt_range, dt_floor: initial range of A and dt, see ``DecayGate``.
        backend: of the recurrence, see ``m2rnn.ops.linear_scan.gated_linear_scan``; None chooses.

    Raises:
        ValueError: for a size or ``conv_init`` that is not positive, heads that do not divide ``inner_size``, or
            ``norm_before_gate`` without a norm or a gate.

    Source: Transformers are SSMs (arXiv 2405.21060) as in the M²RNN paper (arXiv 2603.14360).
    """

    _no_weight_decay = ("D",)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int | None = None,
        state_size: int = 128,
        inner_size: int | None = None,
        *,
        conv_size: int | None = 4,
        conv_init: float | None = None,
        conv_bias: bool = True,
        activation: str | None = "silu",
        norm: bool = True,
        norm_eps: float = 1e-5,
        residual: bool = True,
        gate: bool = True,
        norm_before_gate: bool = False,
        A_range: tuple[float, float] = (0.0, 16.0),
        dt_range: tuple[float, float] = (1e-3, 0.1),
        dt_floor: float = 1e-4,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        check_sizes(hidden_size=hidden_size, num_heads=num_heads, state_size=state_size, inner_size=inner_size)
        inner_size = 2 * hidden_size if inner_size is None else inner_size
        num_heads = max(1, inner_size // 64) if num_heads is None else num_heads
        if inner_size % num_heads:
            raise ValueError(f"num_heads must divide inner_size ({inner_size}), got {num_heads}")
        check_activation(activation)
        check_init_std(conv_init=conv_init)
        check_gate_order(norm_before_gate, norm, gate)

        self.num_heads, self.state_size, self.head_dim = num_heads, state_size, inner_size // num_heads
        self.activation, self.gate, self.backend = activation, gate, backend
        self.norm_before_gate = norm_before_gate
        self.xBC_sizes = inner_size, state_size, state_size
        self.proj_sizes = sum(self.xBC_sizes), num_heads, inner_size if gate else 0

        self.in_proj = nn.Linear(hidden_size, sum(self.proj_sizes), bias=False)
        self.conv = None
        if conv_size is not None:
            self.conv = ShortConv(sum(self.xBC_sizes), conv_size, activation, bias=conv_bias, init_std=conv_init)
        self.decay_gate = DecayGate(num_heads, A_range, dt_range, dt_floor)
        self.D = nn.Parameter(torch.empty(num_heads)) if residual else None
        self.norm = nn.RMSNorm(inner_size, eps=norm_eps) if norm else None
        self.out_proj = OutputProjection(inner_size, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise D; the projections keep torch's default until a model initialises them."""
        if self.D is not None:
            initialize(self.D, lambda D: D.fill_(1))

    def forward(
        self,
        hidden: Tensor,
        state: M2RNNState | None = None,
        packing: Packing | None = None,
        *,
        position_ids: Tensor | None = None,
        output_state: bool = True,
    ) -> tuple[Tensor, M2RNNState | None]:
        """Mix along time; arguments and results as in ``M2RNN.forward``."""
        check_tokens(hidden, state, packing, self.hidden_size)
        xBC, logits, g = project_parts(self.in_proj, hidden, self.proj_sizes)
        xBC, conv_state = convolve(xBC, self.conv, self.activation, state, packing, output_state=output_state)
        x, B, C = xBC.split(self.xBC_sizes, -1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        log_decay, dt = self.decay_gate(logits)

        y, recurrent = gated_linear_scan(
            C[:, :, None],
            B[:, :, None],
            dt[..., None] * x,
            log_decay,
            initial_state=None if state is None else state.recurrent,
            cu_seqlens=None if packing is None else packing.cu_seqlens,
            backend=self.backend,
        )
        if self.D is not None:
            y = y + self.D.to(y.dtype)[:, None] * x
        gate = F.silu(g) if self.gate else None
        y = self.out_proj(gated_norm(y.flatten(2), gate, self.norm, norm_before_gate=self.norm_before_gate))
        final_state = next_state(state, recurrent, conv_state, hidden, packing) if output_state else None
        return y, final_state

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, state_size={self.state_size}, head_dim={self.head_dim}"
