"""The operators as functions of tensors. Each has a folder: definition, public function, backends."""

from typing import TYPE_CHECKING, Any

from m2rnn.ops.cross_entropy import linear_cross_entropy
from m2rnn.ops.decode import decode_step
from m2rnn.ops.scan import available_backends, m2rnn_scan, m2rnn_step
from m2rnn.ops.vector_scan import gru_scan, rnn_scan

if TYPE_CHECKING:
    from m2rnn.ops.linear_scan import gated_delta_scan, gated_linear_scan

_LINEAR = ("gated_delta_scan", "gated_linear_scan")

__all__ = [
    "available_backends",
    "decode_step",
    "gated_delta_scan",
    "gated_linear_scan",
    "gru_scan",
    "linear_cross_entropy",
    "m2rnn_scan",
    "m2rnn_step",
    "rnn_scan",
]


def __getattr__(name: str) -> Any:
    """Imported when it is used: the linear recurrences bring torch's compiler, a second at import."""
    if name in _LINEAR:
        from m2rnn.ops import linear_scan

        return getattr(linear_scan, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
