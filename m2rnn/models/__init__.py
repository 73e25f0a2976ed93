"""Hugging Face models of these layers; importing this registers them with the Auto classes."""

from m2rnn.models import presets
from m2rnn.models.cache import M2RNNCache
from m2rnn.models.classification import M2RNNForSequenceClassification, M2RNNForTokenClassification
from m2rnn.models.config import M2RNNConfig
from m2rnn.models.model import M2RNNForCausalLM, M2RNNModel

__all__ = [
    "M2RNNCache",
    "M2RNNConfig",
    "M2RNNForCausalLM",
    "M2RNNForSequenceClassification",
    "M2RNNForTokenClassification",
    "M2RNNModel",
    "presets",
]
