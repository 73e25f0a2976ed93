"""A call of `decode_step` as its kernel sees it."""

from typing import NamedTuple

from torch import Tensor


class Token(NamedTuple):
    """The arguments of `decode_step`, in the order of the operators' own, which take no tuple."""

    projected: Tensor
    state: Tensor
    conv_state: Tensor | None
    weight: Tensor
    A_log: Tensor
    dt_bias: Tensor
    conv_weight: Tensor | None
    conv_bias: Tensor | None
    D: Tensor | None
    norm_weight: Tensor | None
    norm_eps: float
    q_heads: int
    k_heads: int
    v_heads: int
    g_heads: int
    silu: bool
    backend: str | None
