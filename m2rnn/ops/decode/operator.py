"""Operators for decoding: one token of an M2RNN layer between its projections, and a projection of a few rows.

``decode_step`` exists twice. ``m2rnn::decode_step`` returns new states, so that the caller keeps the old ones, as beam
search does; ``m2rnn::decode_step_`` writes them where the old ones are, so that a CUDA graph finds them at the same
address at every token. The kernel is the same, and both read and write each state once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from m2rnn.ops.backends.dtypes import state_dtype
from m2rnn.ops.decode.token import Token
from m2rnn.ops.scan import m2rnn_step

FEW_ROWS = 4  #: that ``few_rows_linear`` multiplies with its own kernel; more are a matter for a matrix product


def decode_step(
    projected: Tensor,
    state: Tensor,
    conv_state: Tensor | None,
    weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    D: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    q_heads: int = 1,
    k_heads: int = 1,
    v_heads: int = 1,
    g_heads: int = 0,
    silu: bool = True,
    in_place: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One token of an M2RNN layer between its input and output projections, not differentiable.

    With [q | k | v | logits | g] the projected row::

        q, k, v = silu(conv(q | k | v))
        f = exp(-exp(A_log) · softplus(logits + dt_bias))
        H = f H + (1 - f) tanh(H W + k vᵀ)
        y = RMSNorm((Hᵀ q + D ⊙ v) ⊙ silu(g))

    Args:
        projected: ``[B, channels]``.
        state: H of N heads ``[B, N, K, V]``, float32 or float64.
        conv_state: the convolution's last inputs ``[B, width - 1, q, k and v channels]``, or None.
        weight: W ``[heads, V, V]``; as everywhere, head counts divide N and heads are shared by repetition.
        A_log, dt_bias: of the forget gate, ``[heads]``.
        conv_weight: ``[q, k and v channels, 1, width]``, or None for no convolution; conv_bias: ``[channels]`` or None.
        conv_bias: see conv_weight.
        D: ``[N, V]`` or None.
        norm_weight: ``[N · V]`` or None for no norm; norm_eps is its epsilon.
        norm_eps: see norm_weight.
        q_heads, k_heads, v_heads, g_heads: head counts; no output gate if g_heads is 0.
        silu: whether q, k and v go through SiLU.
        in_place: whether to write the new states to ``state`` and ``conv_state``.
        backend: as in ``m2rnn_scan``.

    Returns:
        ``(y, state, conv_state)``: y ``[B, N · V]`` in the dtype of ``projected``, and the states after the token.
    """
    token = Token(
        projected, state, conv_state, weight, A_log, dt_bias, conv_weight, conv_bias, D, norm_weight, norm_eps,
        q_heads, k_heads, v_heads, g_heads, silu, backend,
    )  # fmt: skip
    if in_place:
        return torch.ops.m2rnn.decode_step_(*token), state, conv_state
    y, state, new_conv_state = torch.ops.m2rnn.decode_step(*token)
    return y, state, None if conv_state is None else new_conv_state


def few_rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ`` for x of at most ``FEW_ROWS`` rows ``[B, columns]``, not differentiable.

    On a GPU this is bound by the reading of W, which the kernel begins while the kernels before it still run.
    """
    y: Tensor = torch.ops.m2rnn.few_rows_linear(x, weight)
    return y


_LIBRARY = library.Library("m2rnn", "FRAGMENT")
_PARAMETERS = (
    "Tensor weight, Tensor A_log, Tensor dt_bias, Tensor? conv_weight, Tensor? conv_bias, Tensor? D,"
    " Tensor? norm_weight, float norm_eps, int q_heads, int k_heads, int v_heads, int g_heads, bool silu, str? backend"
)
_LIBRARY.define(
    f"decode_step(Tensor projected, Tensor state, Tensor? conv_state, {_PARAMETERS}) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    f"decode_step_(Tensor projected, Tensor(a!) state, Tensor(b!)? conv_state, {_PARAMETERS}) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define("few_rows_linear(Tensor x, Tensor weight) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


@library.impl(_LIBRARY, "decode_step", "CompositeExplicitAutograd")
def _decode_step(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    token = Token(*arguments)
    new_state: Tensor
    new_conv_state: Tensor | None
    if _has_kernel(token):
        from m2rnn.ops.decode.cuda import step

        new_state = torch.empty_like(token.state)
        new_conv_state = None if token.conv_state is None else torch.empty_like(token.conv_state)
        y = step.step(token, new_state, new_conv_state)
    else:
        y, new_state, new_conv_state = _plain(token)
    return y, new_state, token.projected.new_empty(0) if new_conv_state is None else new_conv_state


@library.impl(_LIBRARY, "decode_step_", "CompositeExplicitAutograd")
def _decode_step_(*arguments: Any) -> Tensor:
    token = Token(*arguments)
    if _has_kernel(token):
        from m2rnn.ops.decode.cuda import step

        return step.step(token, token.state, token.conv_state)
    y, new_state, new_conv_state = _plain(token)
    token.state.copy_(new_state)
    if token.conv_state is not None and new_conv_state is not None:
        token.conv_state.copy_(new_conv_state)
    return y


def _has_kernel(token: Token) -> bool:
    if token.backend not in (None, "cuda") or not token.projected.is_cuda:
        return False
    from m2rnn.ops.decode.cuda import step

    return step.why_not(token) is None


def _plain(token: Token) -> tuple[Tensor, Tensor, Tensor | None]:
    """The equations, in the state's precision."""
    batch, heads, key_dim, value_dim = token.state.shape
    sizes = token.q_heads * key_dim, token.k_heads * key_dim, token.v_heads * value_dim
    dtype = state_dtype(token.projected, token.state)
    qkv, logits, g = token.projected.split((sum(sizes), token.A_log.shape[0], token.g_heads * value_dim), -1)
    new_conv_state = None
    if token.conv_weight is None:
        qkv = qkv.to(dtype)
    else:
        assert token.conv_state is not None
        window = torch.cat([token.conv_state.to(qkv.dtype), qkv[:, None]], 1)
        new_conv_state = window[:, 1:].clone()
        qkv = (window.to(dtype) * token.conv_weight[:, 0].to(dtype).T).sum(1)
        if token.conv_bias is not None:
            qkv = qkv + token.conv_bias.to(dtype)
    if token.silu:
        qkv = F.silu(qkv)
    heads_of_qkv = (token.q_heads, token.k_heads, token.v_heads)
    q, k, v = (x.unflatten(-1, (count, -1)) for x, count in zip(qkv.split(sizes, -1), heads_of_qkv, strict=True))
    f = torch.exp(-token.A_log.to(dtype).exp() * F.softplus(logits.to(dtype) + token.dt_bias.to(dtype)))
    y, new_state = m2rnn_step(q, k, v, f, token.weight, token.state, backend=token.backend)
    if token.D is not None:
        y = y + token.D.to(dtype) * v.repeat_interleave(heads // token.v_heads, 1)
    if token.g_heads:
        gates = F.silu(g.to(dtype)).view(batch, token.g_heads, value_dim)
        y = y * gates.repeat_interleave(heads // token.g_heads, 1)
    y = y.reshape(batch, heads * value_dim)
    if token.norm_weight is not None:
        y = F.rms_norm(y, y.shape[-1:], token.norm_weight.to(dtype), token.norm_eps)
    return y.to(token.projected.dtype), new_state, new_conv_state


@library.impl(_LIBRARY, "few_rows_linear", "CompositeExplicitAutograd")
def _few_rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    if x.is_cuda and 0 < x.shape[0] <= FEW_ROWS:
        from m2rnn.ops.decode.cuda import step

        if step.why_not_linear(x, weight) is None:
            return step.linear(x, weight)
    return F.linear(x, weight).clone()


@library.register_fake("m2rnn::decode_step", lib=_LIBRARY)
def _decode_step_fake(
    projected: Tensor, state: Tensor, conv_state: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    new_conv_state = projected.new_empty(0 if conv_state is None else conv_state.shape)
    return _decode_step_fake_(projected, state, conv_state), state.new_empty(state.shape), new_conv_state


@library.register_fake("m2rnn::decode_step_", lib=_LIBRARY)
def _decode_step_fake_(projected: Tensor, state: Tensor, conv_state: Tensor | None, *rest: object) -> Tensor:
    _, heads, _, value_dim = state.shape
    return projected.new_empty(projected.shape[0], heads * value_dim)


@library.register_fake("m2rnn::few_rows_linear", lib=_LIBRARY)
def _few_rows_linear_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
