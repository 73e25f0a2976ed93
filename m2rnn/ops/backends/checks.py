"""Checks of arguments that several operators take."""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def refuse_forward_mode(operator: str, inputs: Iterable[Tensor | None]) -> None:
    """Raise if an input carries a tangent, as under ``torch.func.jvp``: the operators would drop it, and return 0."""
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(
            f"{operator} has no forward-mode derivative (torch.func.jvp and jacfwd): take torch.autograd.grad"
        )


def validate_packing(cu_seqlens: Tensor | None, x: Tensor, name: str) -> int:
    """The number of sequences in an input [B, T, ...] of this name; raises if ``cu_seqlens`` cannot pack them."""
    if cu_seqlens is None:
        return x.shape[0]
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens is a {type(cu_seqlens).__name__}, expected a tensor [sequences + 1]")
    shape = list(cu_seqlens.shape)
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"cu_seqlens has shape {shape}, expected [sequences + 1]")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens has dtype {cu_seqlens.dtype}, expected int32 or int64")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, expected {x.device} like {name}")
    if x.shape[0] != 1:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected B = 1 when cu_seqlens packs the sequences")
    return shape[0] - 1


def validate_clip(state_clip: float | None) -> None:
    if state_clip is not None and not (isinstance(state_clip, int | float) and state_clip > 0):
        kind = type(state_clip).__name__
        raise ValueError(f"state_clip is {state_clip!r} ({kind}), expected a positive number or None")


def validate_offsets(cu_seqlens: Tensor | None, steps: int) -> None:
    """What needs the values of ``cu_seqlens``, and so happens inside the operator, where a compiler does not look."""
    if cu_seqlens is None or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != steps or any(a > b for a, b in itertools.pairwise(offsets)):
        shown = offsets if len(offsets) <= 8 else [*offsets[:4], "...", *offsets[-3:]]
        raise ValueError(f"cu_seqlens is {shown}, expected offsets that rise from 0 to T = {steps}")
