"""Where the tokens of several sequences lie: side by side in one packed row, or in the rows of a grid."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Sequences end to end in one row ``[1, total, ...]``, and their places in a grid ``[rows, width, ...]``.

    Every mixer takes packed tokens and this description of them. It is built once a forward pass, from a
    padding mask (``from_mask``: the grid is the padded batch, holes anywhere) or from the boundaries
    (``from_cu_seqlens``: the grid holds one sequence a row, padded on the right to the longest).

    Attributes:
        cu_seqlens: int32 ``[N + 1]``, sequence n is tokens ``cu_seqlens[n]`` to ``cu_seqlens[n + 1] - 1``.
        sequence_ids: int64 ``[total]``, sequence of each packed token.
        starts: int32 ``[total]``, first token of the sequence of each packed token.
        slots: int64 ``[total]``, place of each packed token in the flattened grid.
        width: columns of the grid.
        right_padded: whether every sequence starts at column 0 of its row, without holes.
        full: whether there is no padding at all: sequences of equal length, whose grid is the packed row in another
            shape.

    Nothing is computed on demand and kept, nor kept as a number what a shape tells: compiled layers would be compiled
    anew for the second layer and for another number of sequences.
    """

    cu_seqlens: Tensor
    sequence_ids: Tensor
    starts: Tensor
    slots: Tensor
    width: int
    right_padded: bool
    full: bool = False

    @classmethod
    def from_mask(cls, mask: Tensor) -> "Packing":
        """From a padding mask ``[B, T]``, non-zero at real tokens; row b is sequence b, with any holes."""
        if mask.dim() != 2:
            raise ValueError(f"mask must be a [batch, time] padding mask, got shape {tuple(mask.shape)}")
        real = mask != 0
        cu_seqlens = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
        width = mask.shape[1]
        slots = real.flatten().nonzero().squeeze(1)
        row = slots // max(1, width)
        return cls(cu_seqlens, row, cu_seqlens[row], slots, width, right_padded=False)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, total: int) -> "Packing":
        """From the boundaries of the sequences in a row of ``total`` tokens."""
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            got = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
            raise ValueError(f"cu_seqlens must be a vector of int32 or int64, got {got}")
        bounds = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        if not bounds or bounds[0] != 0 or bounds[-1] != total or min(lengths, default=0) < 0:
            raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens ({total}), got {bounds}")
        width = max(lengths, default=0)
        # A copy, since whoever remembers results by the tensor, as fla does, must not meet it with other values
        offsets = cu_seqlens.to(torch.int32, copy=True)
        if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
            # Compiled layers are not compiled anew where another number of sequences is packed
            torch._dynamo.maybe_mark_dynamic(offsets, 0)
        rows = torch.arange(len(lengths), device=offsets.device)
        row = rows.repeat_interleave(offsets.diff(), output_size=total)
        starts = offsets[row]
        column = torch.arange(total, device=offsets.device) - starts
        full = 0 < total == len(lengths) * width
        return cls(offsets, row, starts, row * width + column, width, right_padded=True, full=full)

    @property
    def rows(self) -> int:
        """Rows of the grid: the number of sequences N, empty ones included."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def total(self) -> int:
        """Number of packed tokens."""
        return self.slots.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each sequence, int32 ``[N]``."""
        return self.cu_seqlens.diff()

    @property
    def aligned(self) -> "Packing":
        """The same sequences with a right-padded grid: there, causality alone hides the padding."""
        return self if self.right_padded else Packing.from_cu_seqlens(self.cu_seqlens, self.slots.shape[0])

    def to(self, device: torch.device | str | int) -> "Packing":
        """The same on another device: accelerate calls this for the layers of a model that lies on several."""
        moved = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]

    def pack(self, grid: Tensor) -> Tensor:
        """``[rows, width, ...]`` to ``[1, total, ...]``: the real tokens alone."""
        if self.full:
            return grid.flatten(0, 1)[None]
        return grid.flatten(0, 1).index_select(0, self.slots)[None]

    def pad(self, packed: Tensor, value: float = 0) -> Tensor:
        """``[1, total, ...]`` to ``[rows, width, ...]``, with ``value`` in the padding; perhaps a view."""
        if self.full:
            return packed.reshape(-1, self.width, *packed.shape[2:])
        grid = packed.new_full((self.rows * self.width, *packed.shape[2:]), value)
        return grid.index_copy(0, self.slots.to(grid.device), packed[0]).view(self.rows, self.width, *packed.shape[2:])


def check_tokens(
    hidden: Tensor, state: Sequence[Tensor | None] | None, packing: Packing | None, hidden_size: int
) -> None:
    """Raise a ValueError unless these go together as the arguments of a mixer."""
    if hidden.dim() != 3:
        raise ValueError(f"hidden must be [B, T, hidden_size], got shape {tuple(hidden.shape)}")
    if hidden.shape[2] != hidden_size:
        got = f"got shape {tuple(hidden.shape)}"
        raise ValueError(f"hidden must be [B, T, {hidden_size}], the width that the layer was made with; {got}")
    if packing is not None and hidden.shape[:2] != (1, packing.total):
        got = f"got shape {tuple(hidden.shape)}"
        raise ValueError(f"with packing, hidden must be [1, {packing.total}, hidden_size], {got}")
    sequences = hidden.shape[0] if packing is None else packing.rows
    first = None if state is None else state[0]
    if first is not None and first.shape[0] != sequences:
        raise ValueError(f"state is of {first.shape[0]} sequences, but hidden is of {sequences}")
