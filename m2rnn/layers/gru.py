"""A gated recurrent unit as a mixer, on torch's own implementation."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from m2rnn.layers.packing import Packing
from m2rnn.layers.projection import OutputProjection


class GRUState(NamedTuple):
    """Attributes: recurrent: the hidden vector of each sequence ``[B, state_size]``."""

    recurrent: Tensor


class GRU(nn.Module):
    """``torch.nn.GRU`` over the tokens, then an output projection without bias.

    Args:
        hidden_size: width of the input and the output.
        state_size: width of the recurrent state; default ``hidden_size``.
    """

    def __init__(self, hidden_size: int, state_size: int | None = None) -> None:
        super().__init__()
        state_size = hidden_size if state_size is None else state_size
        if state_size < 1:
            raise ValueError(f"state_size must be at least 1, got {state_size}")
        self.rnn = nn.GRU(hidden_size, state_size, batch_first=True)
        self.out_proj = OutputProjection(state_size, hidden_size)

    def forward(
        self,
        hidden: Tensor,
        state: GRUState | None = None,
        packing: Packing | None = None,
        *,
        position_ids: Tensor | None = None,
        output_state: bool = True,
    ) -> tuple[Tensor, GRUState | None]:
        """Mix along time; arguments and results as in ``M2RNN.forward``."""
        if packing is not None:  # right-padded rows: the padding comes after every token, so it changes none
            packing = packing.aligned
            hidden = packing.pad(hidden)
        initial = hidden.new_zeros(hidden.shape[0], self.rnn.hidden_size) if state is None else state.recurrent
        initial = initial.to(hidden.dtype)
        if hidden.numel():
            y = self.rnn(hidden, initial[None])[0]
        else:  # torch's GRU refuses zero tokens
            y = hidden.new_zeros(*hidden.shape[:2], self.rnn.hidden_size)
        final_state = None
        if output_state:
            rows = torch.arange(y.shape[0], device=y.device)
            ends = y.shape[1] if packing is None else packing.lengths
            final_state = GRUState(torch.cat([initial[:, None], y], 1)[rows, ends])
        if packing is not None:
            y = packing.pack(y)
        return self.out_proj(y), final_state
