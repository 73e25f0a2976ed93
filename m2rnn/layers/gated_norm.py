"""What every mixer ends with before its last projection: a norm and an output gate, in either order."""

from torch import Tensor, nn


def check_gate_order(norm_before_gate: bool, norm: bool, gate: bool) -> None:
    """Raise a ValueError if there is nothing to order."""
    for name, present in (("norm", norm), ("gate", gate)):
        if norm_before_gate and not present:
            raise ValueError(
                f"norm_before_gate=True orders the norm and the gate, but {name}=False: leave norm_before_gate out, or "
                f"set {name}=True"
            )


def normed(y: Tensor, norm: nn.RMSNorm | None) -> Tensor:
    """``norm(y)`` in the dtype of its weight, or y if there is no norm."""
    if norm is None:
        return y
    normed: Tensor = norm(y.to(norm.weight.dtype))  # autocast leaves it to us
    return normed


def gated_norm(y: Tensor, gate: Tensor | None, norm: nn.RMSNorm | None, *, norm_before_gate: bool = False) -> Tensor:
    """``norm(y ⊙ gate)``, or ``norm(y) ⊙ gate``, for a gate of y's shape; without what is None."""
    if gate is None:
        return normed(y, norm)
    return normed(y, norm) * gate if norm_before_gate else normed(y * gate, norm)
