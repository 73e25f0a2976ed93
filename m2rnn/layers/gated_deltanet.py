"""The Gated DeltaNet mixer: a linear recurrence that corrects its state towards each new key and value."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2rnn.layers.decay_gate import DecayGate
from m2rnn.layers.gated_norm import check_gate_order, gated_norm
from m2rnn.layers.packing import Packing, check_tokens
from m2rnn.layers.projection import OutputProjection, project_parts
from m2rnn.layers.short_conv import ShortConv, check_activation, check_init_std, convolve
from m2rnn.layers.sizes import check_sizes
from m2rnn.layers.state import M2RNNState, next_state
from m2rnn.ops.linear_scan import gated_delta_scan

NORM_EPS = 1e-6  # of the length of q and k, as in fla's kernels and in transformers


class GatedDeltaNet(nn.Module):
    """A recurrent mixer with a matrix state per head and the gated delta rule as its update, linear in the state.

    Each token is projected to q, n keys and n values, a forget logit, n logits of β and a gate g; then, per head,

        q, k, v = silu(conv(q, k, v))                     depthwise, causal
        q, k = q / |q|, k / |k|
        β = sigmoid(β logit)                              times 2 with ``negative_eigenvalues``
        f_t = exp(-exp(A_log) · softplus(logit + dt_bias))
        S_t = f_t S_{t-1},  then n times  S_t ← S_t + β k (v - S_tᵀ k)ᵀ
        y_t = S_tᵀ q_t / √K

    and the output is ``out_proj(norm(y ⊙ silu(g)))``, with an RMSNorm over each head whose weights the heads share.
    With n > 1 Householder factors this is Gated DeltaProduct. For state tracking, the eigenvalues of the state's
    transition must reach -1: ``negative_eigenvalues``, which is what β up to 2 does.

    Args:
        hidden_size: width of the input and the output.
        num_heads: heads; default ``hidden_size // value_dim``.
        key_dim, value_dim: K and V, the rows and columns of the state.
        num_householder: n, how often a token writes.
        negative_eigenvalues: eigenvalues in [-1, 1] instead of [0, 1].
        conv_size: width of the convolution over q, k and v; None for none.
        conv_init: s, to start the convolution's weights from N(0, s²), as the authors' code does with s = 0.02; None
            for U(±1/√conv_size).
        activation: ``"silu"`` or None, on q, k and v, with or without a convolution.
        norm: RMSNorm before the output projection.
        norm_eps: its epsilon.
        gate: the output gate silu(g).
        norm_before_gate: norm(y) ⊙ silu(g) instead of norm(y ⊙ silu(g)), as in fla and Qwen3-Next; needs both.
        A_range, dt_range, dt_floor: initial range of the forget gate, see ``DecayGate``.
        backend: of the recurrence, see ``m2rnn.ops.linear_scan.gated_delta_scan``; None chooses.

    Raises:
        ValueError: for a size or ``conv_init`` that is not positive, or ``norm_before_gate`` without a norm or a gate.

    Source: Gated Delta Networks (arXiv 2412.06464) as in the M²RNN paper (arXiv 2603.14360); negative eigenvalues
    arXiv 2411.12537; Householder products arXiv 2502.10297.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int | None = None,
        key_dim: int = 256,
        value_dim: int = 512,
        *,
        num_householder: int = 1,
        negative_eigenvalues: bool = False,
        conv_size: int | None = 4,
        conv_init: float | None = None,
        activation: str | None = "silu",
        norm: bool = True,
        norm_eps: float = 1e-5,
        gate: bool = True,
        norm_before_gate: bool = False,
        A_range: tuple[float, float] = (0.0, 16.0),
        dt_range: tuple[float, float] = (1e-3, 0.1),
        dt_floor: float = 1e-4,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        check_sizes(
            hidden_size=hidden_size,
            num_heads=num_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            num_householder=num_householder,
        )
        if num_heads is None:
            num_heads = max(1, hidden_size // value_dim)
        check_activation(activation)
        check_init_std(conv_init=conv_init)
        check_gate_order(norm_before_gate, norm, gate)

        self.num_heads, self.key_dim, self.value_dim = num_heads, key_dim, value_dim
        self.num_householder, self.negative_eigenvalues = num_householder, negative_eigenvalues
        self.activation, self.gate, self.backend = activation, gate, backend
        self.norm_before_gate = norm_before_gate
        keys, values = num_heads * key_dim, num_heads * value_dim
        self.qkv_sizes = keys, num_householder * keys, num_householder * values
        self.proj_sizes = sum(self.qkv_sizes), num_heads, num_householder * num_heads, values if gate else 0

        self.in_proj = nn.Linear(hidden_size, sum(self.proj_sizes), bias=False)
        self.conv = None
        if conv_size is not None:
            self.conv = ShortConv(sum(self.qkv_sizes), conv_size, activation, init_std=conv_init)
        self.decay_gate = DecayGate(num_heads, A_range, dt_range, dt_floor)
        self.norm = nn.RMSNorm(value_dim, eps=norm_eps) if norm else None
        self.out_proj = OutputProjection(values, hidden_size)

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
        qkv, logits, beta, g = project_parts(self.in_proj, hidden, self.proj_sizes)
        qkv, conv_state = convolve(qkv, self.conv, self.activation, state, packing, output_state=output_state)
        q, k, v = qkv.split(self.qkv_sizes, -1)
        q = q.unflatten(-1, (self.num_heads, self.key_dim))
        k = k.unflatten(-1, (self.num_householder, self.num_heads, self.key_dim))
        v = v.unflatten(-1, (self.num_householder, self.num_heads, self.value_dim))
        log_decay, _ = self.decay_gate(logits)
        beta = beta.to(log_decay.dtype).sigmoid().unflatten(-1, (self.num_householder, self.num_heads))

        y, recurrent = gated_delta_scan(
            unit_length(q, self.key_dim**-0.5),
            unit_length(k),
            v,
            log_decay,
            2 * beta if self.negative_eigenvalues else beta,
            initial_state=None if state is None else state.recurrent,
            cu_seqlens=None if packing is None else packing.cu_seqlens,
            backend=self.backend,
        )
        gate = F.silu(g).unflatten(-1, (self.num_heads, self.value_dim)) if self.gate else None
        y = gated_norm(y, gate, self.norm, norm_before_gate=self.norm_before_gate)
        y = self.out_proj(y.flatten(2))
        final_state = next_state(state, recurrent, conv_state, hidden, packing) if output_state else None
        return y, final_state

    def extra_repr(self) -> str:
        sizes = f"num_heads={self.num_heads}, key_dim={self.key_dim}, value_dim={self.value_dim}"
        return f"{sizes}, num_householder={self.num_householder}, negative_eigenvalues={self.negative_eigenvalues}"


def unit_length(x: Tensor, scale: float = 1.0) -> Tensor:
    """``scale · x / √(|x|² + eps)`` along the last dimension, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (scale * (x.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt())
