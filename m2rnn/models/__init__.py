"""Hugging Face models of these layers; importing this registers them with the Auto classes."""

import sys
from typing import Any

from m2rnn.models import presets
from m2rnn.models.cache import M2RNNCache
from m2rnn.models.classification import M2RNNForSequenceClassification, M2RNNForTokenClassification
from m2rnn.models.config import M2RNNConfig
from m2rnn.models.model import M2RNNForCausalLM, M2RNNModel

# Problem: transformers' server takes the class that config.json names from its own module, also for remote code. Cause:
# it asks no Auto class. In the server's process, which has come here through a shim, the class is there to be found.
_server: Any = sys.modules.get("transformers.cli.serving.model_manager")
if hasattr(_server, "transformers"):
    _server.transformers.M2RNNForCausalLM = M2RNNForCausalLM

__all__ = [
    "M2RNNCache",
    "M2RNNConfig",
    "M2RNNForCausalLM",
    "M2RNNForSequenceClassification",
    "M2RNNForTokenClassification",
    "M2RNNModel",
    "presets",
]
