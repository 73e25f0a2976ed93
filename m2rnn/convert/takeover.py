"""What an M2RNN layer can take over from the Gated DeltaNet or Mamba-2 layer that it replaces.

With W = 0 and small k vᵀ an M2RNN head is linear: H_t = f H_{t-1} + (1 - f) k_t v_tᵀ, a gated linear attention, as
these are. So their projections, convolution and forget gate fit, and W leaves zero as training needs it. Without W the
columns of a state are independent of one another, so a wide value head is as good as several narrow ones with its q, k
and f.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m2rnn.layers import M2RNN

VALUE_DIM = 16  # as in the paper's models
SIZES = ("num_heads", "key_dim", "num_q_heads", "num_k_heads", "num_v_heads", "num_f_heads", "num_g_heads")


class Parts(NamedTuple):
    """Weights of a recurrent mixer in M2RNN's order.

    Attributes:
        key_heads, key_dim, heads, value_dim, conv_size: its sizes; ``heads`` of v, f and g.
        qkv, f, g: rows of the input projection.
        conv: ``[channels of q, k and v, 1, conv_size]``.
        A_log, dt_bias: ``[heads]``.
        D: ``[heads]``, on the scale of a state that (1 - f) k vᵀ drives.
    """

    key_heads: int
    key_dim: int
    heads: int
    value_dim: int
    conv_size: int
    qkv: Tensor
    f: Tensor
    g: Tensor
    conv: Tensor
    A_log: Tensor
    dt_bias: Tensor
    D: Tensor


def parts_of(mixer: Any) -> Parts | None:
    """The parts of a mixer, or None if it is neither Gated DeltaNet nor Mamba-2."""
    if hasattr(mixer, "head_k_dim"):
        return _delta_net(mixer)
    return _mamba2(mixer) if hasattr(mixer, "ssm_state_size") else None


def _delta_net(mixer: Any) -> Parts:
    heads, groups = mixer.num_v_heads, mixer.num_k_heads
    shared, K, V = heads // groups, mixer.head_k_dim, mixer.head_v_dim
    if hasattr(mixer, "in_proj_qkvz"):  # Qwen3-Next: key head by key head
        rows = mixer.in_proj_qkvz.weight.unflatten(0, (groups, -1))
        q, k, v, g = (x.flatten(0, 1) for x in rows.split((K, K, shared * V, shared * V), 1))
        qkv, f = torch.cat([q, k, v]), mixer.in_proj_ba.weight.unflatten(0, (groups, -1))[:, shared:].flatten(0, 1)
    else:
        qkv, f, g = mixer.in_proj_qkv.weight, mixer.in_proj_a.weight, mixer.in_proj_z.weight
    gate, D = (mixer.A_log, mixer.dt_bias), torch.zeros_like(mixer.A_log)
    return Parts(groups, K, heads, V, mixer.conv_kernel_size, qkv, f, g, mixer.conv1d.weight, *gate, D)


def _mamba2(mixer: Any) -> Parts:
    heads, groups, K, V = mixer.num_heads, mixer.n_groups, mixer.ssm_state_size, mixer.head_dim
    channels = heads * V, groups * K, groups * K
    g, x, B, C, f = mixer.in_proj.weight.split((heads * V, *channels, heads))
    conv_x, conv_B, conv_C = mixer.conv1d.weight.split(channels)
    # Its state is driven by dt k vᵀ, and 1 - f is about A dt: the state, and so D, is A times as large here.
    D = mixer.D * mixer.A_log.exp()
    qkv, conv = torch.cat([C, B, x]), torch.cat([conv_C, conv_B, conv_x])
    return Parts(groups, K, heads, V, mixer.conv_kernel_size, qkv, f, g, conv, mixer.A_log, mixer.dt_bias, D)


def options_like(mixer: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """The options of an M2RNN layer: with the mixer's sizes, unless ``options`` name others than ``value_dim``."""
    parts = parts_of(mixer)
    if parts is None or any(name in options for name in SIZES):
        return dict(options)
    value_dim = options.get("value_dim") or (VALUE_DIM if parts.value_dim % VALUE_DIM == 0 else parts.value_dim)
    if parts.value_dim % value_dim:
        raise ValueError(f"value_dim ({value_dim}) must divide that of the replaced mixer ({parts.value_dim})")
    like = {
        "num_heads": parts.heads * parts.value_dim // value_dim,
        "key_dim": parts.key_dim,
        "value_dim": value_dim,
        "num_q_heads": parts.key_heads,
        "num_k_heads": parts.key_heads,
        "num_f_heads": parts.heads,
        "conv_size": parts.conv_size,
    }
    return like | options


@torch.no_grad()
def take_over(mixer: nn.Module, m2rnn: M2RNN) -> None:
    """Copy what fits from the mixer, if its sizes are the layer's, and set W to zero; else leave the layer alone."""
    parts = parts_of(mixer)
    if parts is None:
        return
    pairs = [
        (m2rnn.in_proj.weight, torch.cat([parts.qkv, parts.f, parts.g])),
        (m2rnn.decay_gate.A_log, parts.A_log),
        (m2rnn.decay_gate.dt_bias, parts.dt_bias),
    ]
    if m2rnn.conv is not None:
        pairs.append((m2rnn.conv.weight, parts.conv))
    if m2rnn.D is not None:
        pairs.append((m2rnn.D, parts.D.repeat_interleave(parts.value_dim).view(-1, m2rnn.value_dim)))
    heads = m2rnn.num_q_heads, m2rnn.num_k_heads, m2rnn.key_dim, m2rnn.num_v_heads * m2rnn.value_dim
    same = heads == (parts.key_heads, parts.key_heads, parts.key_dim, parts.heads * parts.value_dim)
    if not same or any(new.shape != old.shape for new, old in pairs):
        return
    for new, old in pairs:
        new.copy_(old)
    m2rnn.state_weight.zero_()
