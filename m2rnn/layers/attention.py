"""Causal softmax attention, with or without rotary positions."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2rnn.layers.packing import Packing
from m2rnn.layers.projection import OutputProjection


class AttentionState(NamedTuple):
    """Keys and values of the tokens so far.

    Attributes:
        keys: ``[B, S, kv heads, head_dim]``, positions already applied.
        values: same shape.
        valid: bool ``[B, S]``, False at slots that hold no token; None if all do.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor | None

    def lengths(self) -> int | Tensor:
        """Tokens seen: one number, or ``[B, 1]`` where sequences differ."""
        return self.keys.shape[1] if self.valid is None else self.valid.sum(1, keepdim=True)

    def crop(self, tokens: int) -> "AttentionState":
        """Without the last ``tokens`` tokens of every sequence."""
        if self.valid is None:
            kept = max(0, self.keys.shape[1] - tokens)
            return AttentionState(self.keys[:, :kept], self.values[:, :kept], None)
        from_the_end = self.valid.flip(1).cumsum(1).flip(1)
        return self._replace(valid=self.valid & (from_the_end > tokens))


class Attention(nn.Module):
    """``softmax(q kᵀ / √head_dim) v`` over each token and those before it, then a projection; no biases.

    Args:
        hidden_size: width of the input and the output.
        num_heads: query heads.
        num_kv_heads: key and value heads, each shared by consecutive query heads; default ``num_heads``.
        head_dim: default ``hidden_size // num_heads``.
        rope_theta: base of the rotary positions, on the two halves of each head; None for no positions.

    Raises:
        ValueError: for head counts or dimensions that do not fit together.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        rope_theta: float | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads ({num_kv_heads}) must divide num_heads ({num_heads})")
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(f"num_heads ({num_heads}) must divide hidden_size ({hidden_size}), or give head_dim")
            head_dim = hidden_size // num_heads
        if rope_theta is not None and (rope_theta <= 0 or head_dim % 2):
            raise ValueError(f"rope_theta ({rope_theta}) must be positive and head_dim ({head_dim}) even")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.rope_theta = rope_theta
        self.in_proj = nn.Linear(hidden_size, (num_heads + 2 * num_kv_heads) * head_dim, bias=False)
        self.out_proj = OutputProjection(num_heads * head_dim, hidden_size)

    def forward(
        self,
        hidden: Tensor,
        state: AttentionState | None = None,
        packing: Packing | None = None,
        *,
        position_ids: Tensor | None = None,
        output_state: bool = True,
    ) -> tuple[Tensor, AttentionState | None]:
        """Mix along time; arguments and results as in ``M2RNN.forward``.

        ``position_ids`` (``[B, T]`` or ``[1, T]``, packed like ``hidden``) only matter with ``rope_theta``;
        by default they count the tokens of each sequence from 0.
        """
        heads = self.in_proj(hidden)
        heads = heads.view(*hidden.shape[:2], self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        if packing is not None:  # right-padded rows: no token comes after the padding, so causality hides it
            packing = packing.aligned
            heads = packing.pad(heads)
            if position_ids is not None:
                position_ids = packing.pad(position_ids)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), 2)
        if self.rope_theta is not None:
            if position_ids is None:
                steps = torch.arange(q.shape[1], device=q.device)[None]
                position_ids = steps if state is None else steps + state.lengths()
            q, k = rotate(q, position_ids, self.rope_theta), rotate(k, position_ids, self.rope_theta)

        past = 0 if state is None else state.keys.shape[1]
        keys, values = k, v
        if state is not None:
            keys = torch.cat([state.keys.to(k.dtype), k], 1)
            values = torch.cat([state.values.to(v.dtype), v], 1)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=None if state is None else self._mask(state, q.shape[1]),
            is_causal=past == 0,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        y = y.transpose(1, 2).flatten(2)
        if packing is not None:
            y = packing.pack(y)
        final_state = AttentionState(keys, values, _valid(state, packing, k)) if output_state else None
        return self.out_proj(y), final_state

    @staticmethod
    def _mask(state: AttentionState, steps: int) -> Tensor | None:
        """Which of past and new slots each new slot sees: valid past ones, and new ones up to itself."""
        past = state.keys.shape[1]
        if past == 0 or (steps == 1 and state.valid is None):
            return None
        mask = torch.ones(steps, past + steps, dtype=torch.bool, device=state.keys.device).tril(past)
        if state.valid is None:
            return mask
        # Every slot sees at least itself, padding too: a row without any visible key would give NaN.
        return mask & F.pad(state.valid, (0, steps), value=True)[:, None, None]


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


def rotate(x: Tensor, position_ids: Tensor, theta: float) -> Tensor:
    """Rotary positions: channels (i, i + D/2) of ``x`` [B, T, H, D] turn by ``position / theta^(2i/D)``."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = (position_ids.to(dtype)[..., None] * frequency)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
