"""M2RNN: a non-linear recurrent layer for language models whose hidden state is a matrix.

``import m2rnn`` is quick: what needs transformers is imported when it is first used. ``import m2rnn.models`` makes
transformers' Auto classes know the model.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m2rnn.convert import load_swapped, swap, swapped_parameters
    from m2rnn.layers import M2RNN, bound_state_weights
    from m2rnn.models import M2RNNConfig, M2RNNForCausalLM, M2RNNModel, presets
    from m2rnn.ops import available_backends, m2rnn_scan, m2rnn_step

__version__ = "0.1.0.dev0"

_MODULES = {
    "m2rnn.ops": ("available_backends", "m2rnn_scan", "m2rnn_step"),
    "m2rnn.layers": ("M2RNN", "bound_state_weights"),
    "m2rnn.models": ("M2RNNConfig", "M2RNNForCausalLM", "M2RNNModel", "presets"),
    "m2rnn.convert": ("load_swapped", "swap", "swapped_parameters"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "M2RNN",
    "M2RNNConfig",
    "M2RNNForCausalLM",
    "M2RNNModel",
    "available_backends",
    "bound_state_weights",
    "load_swapped",
    "m2rnn_scan",
    "m2rnn_step",
    "presets",
    "swap",
    "swapped_parameters",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'm2rnn' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # so that the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
