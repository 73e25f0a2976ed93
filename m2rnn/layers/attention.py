"""Causal softmax attention, over all earlier tokens or a window of them, with or without rotary positions."""

import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2rnn.layers.gated_norm import normed
from m2rnn.layers.packing import Packing, check_tokens
from m2rnn.layers.projection import OutputProjection
from m2rnn.layers.sizes import check_sizes
from m2rnn.layers.state import AttentionState, StaticAttentionState, decodes


@dataclass(frozen=True)
class RotaryTables:
    """Cosines and sines of rotary positions, see ``rotary_tables``.

    Attributes:
        cos: ``[B, T, 1, head_dim / 2]``, B may be 1 for any batch; float32 or float64.
        sin: likewise.

    No tuple, since FSDP casts tensors that it finds in tuples to the dtype of the weights.
    """

    cos: Tensor
    sin: Tensor

    def to(self, device: torch.device | str | int) -> "RotaryTables":
        """The same on another device: accelerate calls this for the layers of a model that lies on several."""
        return RotaryTables(self.cos.to(device), self.sin.to(device))


class Attention(nn.Module):
    """``softmax(q kᵀ / √head_dim) v`` over each token and those before it, then a projection; no biases.

    Args:
        hidden_size: width of the input and the output.
        num_heads: query heads.
        num_kv_heads: key and value heads, each shared by consecutive query heads; default ``num_heads``.
        head_dim: default ``hidden_size // num_heads``.
        rope_theta: base of the rotary positions, on the two halves of each head; None for no positions.
        qk_norm: RMSNorm over each head of q and of k, before the positions, as in Qwen3; the heads of q share one
            weight ``[head_dim]``, and those of k another.
        norm_eps: its epsilon.
        window: a token sees itself and the ``window - 1`` tokens before it in its sequence, as in Mistral 7B; None for
            all. A state keeps every key and value all the same.

    Raises:
        ValueError: for head counts or dimensions that do not fit together, or a size or window below 1.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        rope_theta: float | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        check_sizes(
            hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, window=window
        )
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads ({num_kv_heads}) must divide num_heads ({num_heads})")
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(f"num_heads ({num_heads}) must divide hidden_size ({hidden_size}), or give head_dim")
            head_dim = hidden_size // num_heads
        if rope_theta is not None and (rope_theta <= 0 or head_dim % 2):
            raise ValueError(f"rope_theta ({rope_theta}) must be positive and head_dim ({head_dim}) even")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.rope_theta, self.window = rope_theta, window
        self.in_proj = nn.Linear(hidden_size, (num_heads + 2 * num_kv_heads) * head_dim, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else None
        self.out_proj = OutputProjection(num_heads * head_dim, hidden_size)

    def forward(
        self,
        hidden: Tensor,
        state: AttentionState | StaticAttentionState | None = None,
        packing: Packing | None = None,
        *,
        position_ids: Tensor | None = None,
        rotary: RotaryTables | None = None,
        output_state: bool = True,
    ) -> tuple[Tensor, AttentionState | StaticAttentionState | None]:
        """Mix along time; arguments and results as in ``M2RNN.forward``.

        ``position_ids`` (``[B, T]`` or ``[1, T]``, packed like ``hidden``) only matter with ``rope_theta``; by default
        they count the tokens of each sequence from 0.
        ``rotary`` is what ``rotary_tables`` makes of them, for a caller that has it already.
        """
        check_tokens(hidden, state, packing, self.hidden_size)
        if isinstance(state, StaticAttentionState) and not (output_state and decodes(hidden, packing)):
            state = state.dynamic()
        heads = self.in_proj(hidden)
        heads = heads.view(*hidden.shape[:2], self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        qk, v = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((self.num_heads, self.num_kv_heads), 2)
            qk = torch.cat([normed(q, self.q_norm).to(q.dtype), normed(k, self.k_norm).to(k.dtype)], 2)
        if self.rope_theta is not None:
            if rotary is None:
                if position_ids is None:
                    position_ids = positions_of(hidden, state, packing)
                rotary = rotary_tables(position_ids, self.head_dim, self.rope_theta, hidden.dtype)
            qk = rotate(qk, rotary)

        if packing is not None:
            packing = packing.aligned
            if state is None and not output_state and not packing.full and self._runs_packed(heads):
                q, k = qk[0].split((self.num_heads, self.num_kv_heads), 1)
                y = self._attend_packed(q, k, v[0], packing.cu_seqlens, packing.width)
                return self.out_proj(y[None]), None
            # Right-padded rows: no token comes after the padding, so causality hides it
            qk, v = packing.pad(qk), packing.pad(v)
        q, k = qk.split((self.num_heads, self.num_kv_heads), 2)

        if isinstance(state, StaticAttentionState):
            state.append(k, v)
            visible = state.valid
            if self.window is not None:
                counted = visible.cumsum(1)
                visible = visible & (counted > counted[:, -1:] - self.window)
            y = self._attend(q, state.keys, state.values, attn_mask=visible[:, None, None])
            return self.out_proj(y), state

        steps = q.shape[1]
        if state is None and self.window is not None and steps > self.window and self._runs_packed(q):
            offsets = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device) * steps
            y = self._attend_packed(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), offsets, steps)
            keys, values, y = k, v, y.unflatten(0, (-1, steps))
        else:
            keys, values = k, v
            if state is not None:
                keys = torch.cat([state.keys.to(k.dtype), k], 1)
                values = torch.cat([state.values.to(v.dtype), v], 1)
            mask, past = self._mask(state, q), 0 if state is None else state.keys.shape[1]
            # A branch, since torch.compile may not know how long the past is, and is_causal must be known
            options = {"is_causal": True} if mask is None and past == 0 else {"attn_mask": mask}
            y = self._attend(q, keys, values, **options)
        if packing is not None:
            y = packing.pack(y)
        final_state = AttentionState(keys, values, _valid(state, packing, k)) if output_state else None
        return self.out_proj(y), final_state

    def _runs_packed(self, heads: Tensor) -> bool:
        flash = heads.dtype in (torch.bfloat16, torch.float16) and self.head_dim % 8 == 0 and self.head_dim <= 256
        return flash and heads.numel() > 0 and runs_packed(heads.device, self.num_heads != self.num_kv_heads)

    def _attend_packed(self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
        """[total, heads or kv heads, head_dim] each to [total, heads · head_dim], each sequence on its own."""
        from torch.nn.attention import varlen

        options: dict[str, Any] = {"window_size": (-1 if self.window is None else self.window - 1, 0)}  # causal
        if self.num_heads != self.num_kv_heads:
            options["enable_gqa"] = True
        y = cast(Tensor, varlen.varlen_attn(q, k, v, offsets, offsets, longest, longest, **options))
        return y.flatten(1)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
        """[B, T, heads, head_dim] and [B, S, kv heads, head_dim] to [B, T, heads · head_dim]."""
        q, keys, values = q.transpose(1, 2), keys.transpose(1, 2).to(q.dtype), values.transpose(1, 2).to(q.dtype)
        shared = self.num_heads != self.num_kv_heads
        y = F.scaled_dot_product_attention(q, keys, values, enable_gqa=shared, **options)
        return y.transpose(1, 2).flatten(2)

    def _mask(self, state: AttentionState | None, q: Tensor) -> Tensor | None:
        """Which of past and new slots each new slot sees: valid past ones, and new ones up to itself, in its window.

        None where causality says it all: without a past, or if one token sees all of it.
        """
        steps = q.shape[1]
        past = 0 if state is None else state.keys.shape[1]
        valid = None if state is None or past == 0 else state.valid
        window = self.window
        if valid is None and window is not None and past + steps <= window:
            window = None
        if valid is None and window is None and (past == 0 or steps == 1):
            return None
        mask = torch.ones(steps, past + steps, dtype=torch.bool, device=q.device).tril(past)
        if valid is None:
            return mask if window is None else mask.triu(past - window + 1)
        # Every slot sees at least itself, padding too: a row without any visible key would give NaN.
        valid = F.pad(valid, (0, steps), value=True)
        mask = mask & valid[:, None, None]
        if window is not None:  # it is of tokens, which holes are not
            counted = valid.cumsum(1)[:, None, None]
            mask = mask & (counted > counted[..., past:].transpose(2, 3) - window)
        return mask


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def runs_packed(device: torch.device, shared_heads: bool) -> bool:
    """Whether torch has attention over packed sequences here, without padding: on NVIDIA GPUs from Ampere on."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if not torch.backends.cuda.is_flash_attention_available():
        return False
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters  # these came in different versions of torch
    return "window_size" in known and (not shared_heads or "enable_gqa" in known)


def _valid(state: AttentionState | None, packing: Packing | None, new: Tensor) -> Tensor | None:
    """Which slots hold a token, after ``new`` [B, T, ...] has been appended to ``state``."""
    if packing is None and (state is None or state.valid is None):
        return None
    batch, steps = new.shape[:2]
    valid = torch.ones(batch, steps, dtype=torch.bool, device=new.device)
    if packing is not None:
        valid = torch.arange(steps, device=new.device) < packing.lengths[:, None]
    if state is None:
        return valid
    past = state.valid
    if past is None:
        past = torch.ones(state.keys.shape[:2], dtype=torch.bool, device=new.device)
    return torch.cat([past, valid], 1)


def positions_of(
    hidden: Tensor, state: AttentionState | StaticAttentionState | None, packing: Packing | None
) -> Tensor:
    """The place of each token of ``hidden`` in its sequence, after those of ``state``: int64 ``[B or 1, T]``."""
    past = 0 if state is None else state.lengths()
    device = past.device if isinstance(past, Tensor) else hidden.device
    steps = torch.arange(hidden.shape[1], device=device)[None]
    if packing is None:
        return steps + past
    if isinstance(past, Tensor):
        past = past[packing.sequence_ids.to(device), 0]
    return steps - packing.starts.to(device) + past


def rotary_tables(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> RotaryTables:
    """The cosines and sines with which ``rotate`` turns heads at these positions.

    They stay in float32 (float64 for a ``dtype`` of float64): in 16 bits the turn between two tokens would depend on
    where they are, and not on their distance alone.

    Args:
        position_ids: ``[B, T]``, B may be 1 for any batch.
        head_dim: of the heads, even.
        theta: channel i of a half turns by ``position / theta^(2 i / head_dim)``.
        dtype: of the heads.
    """
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    half = head_dim // 2
    frequency = theta ** (-torch.arange(half, device=position_ids.device, dtype=dtype) / half)
    angle = (position_ids.to(dtype)[..., None] * frequency)[:, :, None]
    return RotaryTables(angle.cos(), angle.sin())


def rotate(x: Tensor, tables: RotaryTables) -> Tensor:
    """Rotary positions: channels (i, i + D/2) of ``x`` [B, T, H, D] turn by the tables' angles, rounded once."""
    cos, sin = tables.cos, tables.sin
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
