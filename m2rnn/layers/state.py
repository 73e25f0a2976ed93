"""What mixers remember between calls, and the rule by which a call writes it in place.

A state is a named tuple of batch-first tensors, so that sequences are selected in all kinds alike. Each kind exists
twice. The plain one never changes: a call returns a new state, and the caller may keep the old one, as beam search
does. ``state.static(length)`` is a copy for decoding, which ``decodes`` lets a call write where it is, so that a CUDA
graph finds it there at every token; ``dynamic()`` is the way back.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m2rnn.layers.packing import Packing


def decodes(tokens: Tensor, packing: Packing | None = None) -> bool:
    """Whether a call is a step of decoding: one token of each sequence, no packing, no gradients.

    Layers, model, cache and CUDA graphs all ask this. Such a call updates a static state in place if it is to return
    the state; every other call leaves its state as it was. Each condition has its reason:

    - One token: all steps have the same shapes, so a graph captured once serves them all. More tokens are a prompt,
      which runs once.
    - No packing: a sequence in it may have no token or several, and each state would grow by another length.
    - No gradients: the backward pass needs the state that a write would destroy.

    Args:
        tokens: ``[B, T, ...]``, ids or hidden vectors.
        packing: the sequences in ``tokens``, or None if each row is one.
    """
    return packing is None and tokens.shape[1] == 1 and not torch.is_grad_enabled()


class M2RNNState(NamedTuple):
    """What a recurrent layer (M2RNN, RNN, GRU, Gated DeltaNet, Mamba-2) remembers of each sequence.

    Attributes:
        recurrent: the matrix states ``[B, H, K, V]``, or vectors ``[B, H, V]``; float32 (float64 for float64 inputs).
        conv: the last inputs of the convolution ``[B, conv_size - 1, channels]``, or None without one.
    """

    recurrent: Tensor
    conv: Tensor | None

    def static(self, length: int) -> "StaticM2RNNState":
        """A copy that the layer updates in place; ``length`` does not matter, the state does not grow."""
        return StaticM2RNNState(self.recurrent.clone(), None if self.conv is None else self.conv.clone())


class StaticM2RNNState(M2RNNState):
    """A state whose tensors a single token updates in place, at addresses that a CUDA graph can keep."""

    def update(self, state: M2RNNState) -> "StaticM2RNNState":
        """Write the tensors of ``state`` into those of this one, which it returns."""
        for kept, new in zip(self, state, strict=True):
            if kept is not None and new is not None:
                kept.copy_(new)
        return self

    def dynamic(self) -> M2RNNState:
        """The state as one that no token changes."""
        return M2RNNState(*(None if x is None else x.clone() for x in self))  # type: ignore[arg-type]


def next_state(
    state: M2RNNState | None, recurrent: Tensor, conv: Tensor | None, hidden: Tensor, packing: Packing | None
) -> M2RNNState:
    """The state after ``hidden``: a new one, or ``state`` itself if that is static and this is a step of decoding."""
    after = M2RNNState(recurrent, conv)
    return state.update(after) if isinstance(state, StaticM2RNNState) and decodes(hidden, packing) else after


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
