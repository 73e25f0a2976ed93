"""The M2RNN mixer: projections, short convolution and forget gate around the matrix-state recurrence."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2rnn.layers.decay_gate import DecayGate
from m2rnn.layers.gated_norm import check_gate_order, normed
from m2rnn.layers.initialize import initialize
from m2rnn.layers.packing import Packing, check_tokens
from m2rnn.layers.projection import OutputProjection, project_parts, project_token, runs_as_written
from m2rnn.layers.short_conv import ShortConv, check_activation, check_init_std, convolve
from m2rnn.layers.sizes import check_sizes
from m2rnn.layers.state import M2RNNState, StaticM2RNNState, decodes, next_state
from m2rnn.layers.state_weight import bound_, head_bounds
from m2rnn.ops import m2rnn_scan
from m2rnn.ops.decode import decode_step

#: Options with which the layer learns to track states, see ``M2RNN.for_state_tracking``
STATE_TRACKING: dict[str, Any] = {
    "key_dim": 4,
    "value_dim": 32,
    "weight_init": "normal",
    "conv_size": None,
    "activation": None,
    "A_range": [4.0, 16.0],
    "dt_range": [0.3, 1.0],
}
_HEADS = ("num_heads", "num_q_heads", "num_k_heads")


class M2RNN(nn.Module):
    """A recurrent mixer whose state is a matrix per head and whose update is non-linear.

    Each token x_t is projected to q, k, v, a forget logit and a gate g; then, per head,

        q, k, v = silu(conv(q, k, v))                     depthwise, causal
        f_t = exp(-exp(A_log) · softplus(logit + dt_bias))
        Z_t = tanh(H_{t-1} W + k_t v_tᵀ)
        H_t = f_t H_{t-1} + (1 - f_t) Z_t
        y_t = H_tᵀ q_t + D ⊙ v_t

    and the output is ``out_proj(norm(y ⊙ silu(g)))``, with one RMSNorm over all heads. q, k, v, f, W and g
    may have fewer heads than N, the largest of the first five counts; each count divides N and is shared by
    repetition. The defaults are the language-model layer; ``M2RNN.for_state_tracking`` has the options for state
    tracking.

    Args:
        hidden_size: width of the input and the output.
        num_heads: heads of v, f, W and g unless given one by one; default ``hidden_size // value_dim``.
        key_dim, value_dim: K and V, the rows and columns of the state.
        num_q_heads, num_k_heads: default 1.
        num_v_heads, num_f_heads, num_weight_heads, num_g_heads: default ``num_heads``.
        conv_size: width of the convolution over q, k and v; None for none.
        conv_init: s, to start the convolution's weights from N(0, s²), as the authors' code does with s = 0.02; None
            for U(±1/√conv_size).
        activation: ``"silu"`` or None, on q, k and v, with or without a convolution.
        norm: RMSNorm before the output projection.
        norm_eps: its epsilon.
        residual: the term D ⊙ v.
        gate: the output gate silu(g).
        norm_before_gate: norm(y) ⊙ silu(g) instead of norm(y ⊙ silu(g)), as in fla and Qwen3-Next; needs both.
        weight_init: W starts as ``"identity"``, or ``"normal"``: N(0, 1/V).
        state_weight_bound: largest singular value of W, at the start and wherever ``bound_state_weights`` is called, as
            ``m2rnn train`` does; below 1 makes heads forget. None for no bound, as in the paper.
        bounded_heads: how many heads of W, the first ones, it holds for; default all. The others can track states.
        A_range, dt_range, dt_floor: initial range of the forget gate, see ``DecayGate``.
        state_clip: bound on each component of the gradient that reaches a state from later tokens, or None.
        backend: of the recurrence, see ``m2rnn.ops.m2rnn_scan``; None chooses.

    Raises:
        ValueError: for a size or ``conv_init`` that is not positive, a head count that does not divide the number of
            heads, or ``norm_before_gate`` without a norm or a gate.

    Source: M²RNN (arXiv 2603.14360), sections 3 and 4.
    """

    _no_weight_decay = ("D",)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int | None = None,
        key_dim: int = 64,
        value_dim: int = 16,
        *,
        num_q_heads: int = 1,
        num_k_heads: int = 1,
        num_v_heads: int | None = None,
        num_f_heads: int | None = None,
        num_weight_heads: int | None = None,
        num_g_heads: int | None = None,
        conv_size: int | None = 4,
        conv_init: float | None = None,
        activation: str | None = "silu",
        norm: bool = True,
        norm_eps: float = 1e-5,
        residual: bool = True,
        gate: bool = True,
        norm_before_gate: bool = False,
        weight_init: str = "identity",
        state_weight_bound: float | None = None,
        bounded_heads: int | None = None,
        A_range: tuple[float, float] = (0.0, 16.0),
        dt_range: tuple[float, float] = (1e-3, 0.1),
        dt_floor: float = 1e-4,
        state_clip: float | None = 1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        check_sizes(hidden_size=hidden_size, key_dim=key_dim, value_dim=value_dim, num_heads=num_heads)
        if num_heads is None:
            num_heads = max(1, hidden_size // value_dim)
        counts = {
            "num_q_heads": num_q_heads,
            "num_k_heads": num_k_heads,
            "num_v_heads": num_heads if num_v_heads is None else num_v_heads,
            "num_f_heads": num_heads if num_f_heads is None else num_f_heads,
            "num_weight_heads": num_heads if num_weight_heads is None else num_weight_heads,
        }
        check_sizes(**counts, num_g_heads=num_g_heads)
        self.num_heads = max(counts.values())
        counts["num_g_heads"] = num_heads if num_g_heads is None else num_g_heads
        for name, count in counts.items():
            if self.num_heads % count:
                raise ValueError(f"{name} must divide the number of heads ({self.num_heads}), got {count}")
        if weight_init not in ("identity", "normal"):
            raise ValueError(f"weight_init must be 'identity' or 'normal', got {weight_init!r}")
        check_activation(activation)
        check_init_std(conv_init=conv_init)
        check_gate_order(norm_before_gate, norm, gate)
        head_bounds(counts["num_weight_heads"], state_weight_bound, bounded_heads)  # raises for wrong ones

        self.num_q_heads, self.num_k_heads, self.num_v_heads = num_q_heads, num_k_heads, counts["num_v_heads"]
        self.key_dim, self.value_dim, self.norm_eps = key_dim, value_dim, norm_eps
        self.activation, self.weight_init, self.norm_before_gate = activation, weight_init, norm_before_gate
        self.state_weight_bound, self.bounded_heads = state_weight_bound, bounded_heads
        self.state_clip, self.backend = state_clip, backend
        self.qkv_sizes = num_q_heads * key_dim, num_k_heads * key_dim, self.num_v_heads * value_dim
        self.num_g_heads = counts["num_g_heads"] if gate else 0
        self.proj_sizes = sum(self.qkv_sizes), counts["num_f_heads"], self.num_g_heads * value_dim

        self.in_proj = nn.Linear(hidden_size, sum(self.proj_sizes), bias=False)
        self.conv = None
        if conv_size is not None:
            self.conv = ShortConv(sum(self.qkv_sizes), conv_size, activation, init_std=conv_init)
        self.decay_gate = DecayGate(counts["num_f_heads"], A_range, dt_range, dt_floor)
        self.state_weight = nn.Parameter(torch.empty(counts["num_weight_heads"], value_dim, value_dim))
        self.D = nn.Parameter(torch.empty(self.num_heads, value_dim)) if residual else None
        self.norm = nn.RMSNorm(self.num_heads * value_dim, eps=norm_eps) if norm else None
        self.out_proj = OutputProjection(self.num_heads * value_dim, hidden_size)
        self.reset_parameters()

    @classmethod
    def for_state_tracking(cls, hidden_size: int, num_heads: int = 8, **options: Any) -> Self:
        """A layer with the options that learn to track a state, such as parity or the product of permutations.

        The state must change with every token from the first step of training. So there is no convolution and no SiLU,
        W starts at random, every head has a q and k of its own, the state is wide (V = 32) and short (K = 4), and the
        forget gates start fast.

        Args:
            hidden_size: width of the input and the output. Inputs should start at unit variance.
            num_heads: heads of everything.
            **options: of the layer, in the place of these.
        """
        return cls(hidden_size, **{**STATE_TRACKING, **dict.fromkeys(_HEADS, num_heads), **options})

    def reset_parameters(self) -> None:
        """Initialise W and D; the projections keep torch's default until a model initialises them."""
        initialize(self.state_weight, self._fill_state_weight)
        if self.D is not None:
            initialize(self.D, lambda D: D.fill_(1))

    def _fill_state_weight(self, weight: Tensor) -> None:
        if self.weight_init == "identity":
            weight.copy_(torch.eye(self.value_dim).to(weight.device))
        else:
            weight.normal_(0, self.value_dim**-0.5)
        bound_(weight, self.state_weight_bound, self.bounded_heads)

    def forward(
        self,
        hidden: Tensor,
        state: M2RNNState | None = None,
        packing: Packing | None = None,
        *,
        position_ids: Tensor | None = None,
        output_state: bool = True,
    ) -> tuple[Tensor, M2RNNState | None]:
        """Mix along time.

        Args:
            hidden: ``[B, T, hidden_size]``, or ``[1, total, hidden_size]`` with ``packing``.
            state: of the tokens before these (of each packed sequence); None starts from zero.
            packing: the sequences in ``hidden``.
            position_ids: not used, the recurrence needs no positions.
            output_state: False saves the work and returns None as the state.

        Returns:
            The output, of ``hidden``'s shape and dtype, and the state after the last token of each sequence. A
            static state is updated in place where ``m2rnn.layers.state.decodes`` says so and a state is wanted, and
            otherwise left alone.

        Raises:
            ValueError: for tokens, state and packing that do not go together.
        """
        check_tokens(hidden, state, packing, self.hidden_size)
        if state is not None and decodes(hidden, packing) and self._decodes_at_once():
            y, after = self._decode(hidden[:, 0], state, in_place=output_state and isinstance(state, StaticM2RNNState))
            return y[:, None], after if output_state else None
        qkv, logits, g = project_parts(self.in_proj, hidden, self.proj_sizes)
        qkv, conv_state = convolve(qkv, self.conv, self.activation, state, packing, output_state=output_state)
        batch_time = qkv.shape[:2]
        q, k, v = qkv.split(self.qkv_sizes, -1)
        q = q.reshape(*batch_time, self.num_q_heads, self.key_dim)
        k = k.reshape(*batch_time, self.num_k_heads, self.key_dim)
        v = v.reshape(*batch_time, self.num_v_heads, self.value_dim)
        log_decay, _ = self.decay_gate(logits)

        y, recurrent = m2rnn_scan(
            q,
            k,
            v,
            log_decay.exp(),
            self.state_weight,
            initial_state=None if state is None else state.recurrent,
            output_final_state=output_state,
            cu_seqlens=None if packing is None else packing.cu_seqlens,
            check_offsets=False,  # the packing's, which has checked them
            state_clip=self.state_clip,
            backend=self.backend,
        )
        if self.D is not None:  # head n of N takes v of head n // (N / count)
            shared = self.num_v_heads, self.num_heads // self.num_v_heads, self.value_dim
            D = self.D.to(y.dtype).view(shared)
            y = y.view(*batch_time, *shared) + D * v[..., None, :]
        if self.norm_before_gate:
            y = normed(y.reshape(*batch_time, self.num_heads * self.value_dim), self.norm)
        if self.num_g_heads:
            g = F.silu(g).view(*batch_time, self.num_g_heads, 1, self.value_dim)
            y = y.view(*batch_time, self.num_g_heads, self.num_heads // self.num_g_heads, self.value_dim) * g
        y = y.reshape(*batch_time, self.num_heads * self.value_dim)
        if not self.norm_before_gate:
            y = normed(y, self.norm)
        final_state = None
        if recurrent is not None and output_state:
            final_state = next_state(state, recurrent, conv_state, hidden, packing)
        return self.out_proj(y), final_state

    def _decodes_at_once(self) -> bool:
        """Whether one operator may stand for the modules between the projections: they are what this layer made."""
        if self.norm_before_gate:
            return False  # the operator gates first
        kinds = (self.conv, ShortConv), (self.decay_gate, DecayGate), (self.norm, nn.RMSNorm)
        return all(part is None or (type(part) is kind and runs_as_written(part)) for part, kind in kinds)

    def _decode(self, hidden: Tensor, state: M2RNNState, *, in_place: bool) -> tuple[Tensor, M2RNNState]:
        """One token ``[B, hidden_size]``: two projections, and one operator for all that is between them."""
        y, recurrent, conv = decode_step(
            project_token(self.in_proj, hidden),
            state.recurrent,
            state.conv,
            self.state_weight,
            self.decay_gate.A_log,
            self.decay_gate.dt_bias,
            conv_weight=None if self.conv is None else self.conv.weight,
            D=self.D,
            norm_weight=None if self.norm is None else self.norm.weight,
            norm_eps=self.norm_eps,
            q_heads=self.num_q_heads,
            k_heads=self.num_k_heads,
            v_heads=self.num_v_heads,
            g_heads=self.num_g_heads,
            silu=self.activation == "silu",
            in_place=in_place,
            backend=self.backend,
        )
        return project_token(self.out_proj, y), state if in_place else M2RNNState(recurrent, conv)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, key_dim={self.key_dim}, value_dim={self.value_dim}"
