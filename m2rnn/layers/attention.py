"""Causal softmax attention, with or without rotary positions."""

import inspect
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2rnn.layers.packing import Packing, check_tokens
from m2rnn.layers.projection import OutputProjection
from m2rnn.layers.sizes import check_sizes


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

    def static(self, length: int) -> "StaticAttentionState":
        """A copy with room for ``length`` tokens."""
        batch, past = self.keys.shape[:2]
        if past > length:
            raise ValueError(f"a static cache of {length} tokens cannot hold {past}")
        keys, values = (F.pad(x, (0, 0, 0, 0, 0, length - past)) for x in (self.keys, self.values))
        valid = self.keys.new_ones(batch, past, dtype=torch.bool) if self.valid is None else self.valid
        used = torch.full((batch,), past, device=valid.device)
        return StaticAttentionState(keys, values, F.pad(valid, (0, length - past)), used)


class StaticAttentionState(NamedTuple):
    """Keys and values with room for more, which a single token fills at addresses that a CUDA graph can keep.

    Attributes:
        keys: ``[B, L, kv heads, head_dim]``, zeros in unused slots; values: same shape.
        values: see keys.
        valid: bool ``[B, L]``, True at slots that hold a token.
        used: int64 ``[B]``, number of slots in use, the same for all.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor
    used: Tensor

    def lengths(self) -> Tensor:
        """Tokens seen ``[B, 1]``."""
        return self.valid.sum(1, keepdim=True)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Keep one token's keys and values ``[B, 1, kv heads, head_dim]``."""
        slot = self.used[:1]
        self.keys.index_copy_(1, slot, k.to(self.keys.dtype))
        self.values.index_copy_(1, slot, v.to(self.values.dtype))
        self.valid.index_fill_(1, slot, True)
        self.used.add_(1)

    def dynamic(self) -> AttentionState:
        """The state as one that grows; the host waits for the device."""
        used = int(self.used[0])
        valid = self.valid[:, :used]
        return AttentionState(self.keys[:, :used], self.values[:, :used], None if bool(valid.all()) else valid)


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
        check_sizes(hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
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
        self.rope_theta = rope_theta
        self.in_proj = nn.Linear(hidden_size, (num_heads + 2 * num_kv_heads) * head_dim, bias=False)
        self.out_proj = OutputProjection(num_heads * head_dim, hidden_size)

    def forward(
        self,
        hidden: Tensor,
        state: AttentionState | StaticAttentionState | None = None,
        packing: Packing | None = None,
        *,
        position_ids: Tensor | None = None,
        output_state: bool = True,
    ) -> tuple[Tensor, AttentionState | StaticAttentionState | None]:
        """Mix along time; arguments and results as in ``M2RNN.forward``.

        A ``StaticAttentionState`` takes a single token, in place. ``position_ids`` (``[B, T]`` or ``[1, T]``, packed
        like ``hidden``) only matter with ``rope_theta``; by default they count the tokens of each sequence from 0.
        """
        check_tokens(hidden, state, packing)
        heads = self.in_proj(hidden)
        heads = heads.view(*hidden.shape[:2], self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        if packing is not None and state is None and not output_state and self._runs_packed(heads):
            packing = packing.aligned
            if not packing.full:
                return self.out_proj(self._attend_packed(heads, packing, position_ids)), None
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

        if isinstance(state, StaticAttentionState):
            assert packing is None
            assert hidden.shape[1] == 1
            state.append(k, v)
            y = self._attend(q, state.keys, state.values, attn_mask=state.valid[:, None, None])
            return self.out_proj(y), state if output_state else None

        past = 0 if state is None else state.keys.shape[1]
        keys, values = k, v
        if state is not None:
            keys = torch.cat([state.keys.to(k.dtype), k], 1)
            values = torch.cat([state.values.to(v.dtype), v], 1)
        mask = None if state is None else self._mask(state, q.shape[1])
        y = self._attend(q, keys, values, attn_mask=mask, is_causal=past == 0)
        if packing is not None:
            y = packing.pack(y)
        final_state = AttentionState(keys, values, _valid(state, packing, k)) if output_state else None
        return self.out_proj(y), final_state

    def _runs_packed(self, heads: Tensor) -> bool:
        flash = heads.dtype in (torch.bfloat16, torch.float16) and self.head_dim % 8 == 0 and self.head_dim <= 256
        return flash and heads.shape[1] > 0 and runs_packed(heads.device, self.num_heads != self.num_kv_heads)

    def _attend_packed(self, heads: Tensor, packing: Packing, position_ids: Tensor | None) -> Tensor:
        """[1, total, heads and kv heads, head_dim] to [1, total, heads · head_dim], each sequence on its own."""
        from torch.nn.attention import varlen

        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), 2)
        if self.rope_theta is not None:
            if position_ids is None:
                position_ids = (torch.arange(q.shape[1], device=q.device) - packing.starts)[None]
            q, k = rotate(q, position_ids, self.rope_theta), rotate(k, position_ids, self.rope_theta)
        offsets, longest = packing.cu_seqlens, packing.width
        options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
        if self.num_heads != self.num_kv_heads:
            options["enable_gqa"] = True
        y = cast(Tensor, varlen.varlen_attn(q[0], k[0], v[0], offsets, offsets, longest, longest, **options))
        return y.flatten(1)[None]

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
        """[B, T, heads, head_dim] and [B, S, kv heads, head_dim] to [B, T, heads · head_dim]."""
        q, keys, values = q.transpose(1, 2), keys.transpose(1, 2).to(q.dtype), values.transpose(1, 2).to(q.dtype)
        shared = self.num_heads != self.num_kv_heads
        y = F.scaled_dot_product_attention(q, keys, values, enable_gqa=shared, **options)
        return y.transpose(1, 2).flatten(2)

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


def rotate(x: Tensor, position_ids: Tensor, theta: float) -> Tensor:
    """Rotary positions: channels (i, i + D/2) of ``x`` [B, T, H, D] turn by ``position / theta^(2i/D)``."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = (position_ids.to(dtype)[..., None] * frequency)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
